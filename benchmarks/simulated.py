"""A study of many trials on many GPUs without either: our conductor, sampler and ledger, a simulated clock.

Trials follow recorded learning curves, each its own model's and of the nearest learning rate. What the driver computes for
a decision is measured and charged to the clock, one decision after the other: a driver that cannot keep up leaves GPUs idle.
It is CPU time, which does not depend on what else a machine does; waiting for the disk is in the wall time alone.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from medtune.config import StudyConfig, TrialConfig
from medtune.data import load_pair
from medtune.definition import Definition, describe
from medtune.needs import Needs
from medtune.placement import Machine
from medtune.placer import Placer
from medtune.record import LocalRecord, write_json
from medtune.reservation import Reservation
from medtune.search.conductor import Conductor, Launch, Report, attempt_folder
from medtune.search.ledger import Ledger
from medtune.search.space import SearchSpace
from medtune.storage.home import Home
from medtune.study import settle

RECORDED = Path(__file__).with_name("curves.json")
HOST_GPUS = 8


@dataclass(frozen=True)
class Curve:
    """One recorded training."""

    model: str
    lr: float
    values: tuple[float, ...]
    """Best selection metric so far, by epoch."""
    seconds: float
    """What an epoch took."""


@dataclass(frozen=True)
class Recorded:
    """Curves, and a report's metrics as they were, for their size."""

    curves: Sequence[Curve]
    best: dict[str, Any]
    external: dict[str, Any]

    @classmethod
    def load(cls, path: Path = RECORDED) -> Recorded:
        """From the file beside this module, or from one that `record` wrote."""
        read = json.loads(path.read_text())
        curves = [Curve(**{**curve, "values": tuple(curve["values"])}) for curve in read["curves"]]
        return cls(curves, read["best"], read["external"])

    @classmethod
    def of(cls, folder: Path) -> Recorded:
        """From a study's folder: its trials that were trained to the end."""
        from medtune.results import epochs, load_study, trial_config

        study = load_study(str(folder))
        rows = [row for row in study.rows if row.state == "COMPLETE"]
        curves = []
        for row in rows:
            config, lines = trial_config(study, row), epochs(study, row)
            values = tuple(round(float(line["best_value"]), 4) for line in lines)
            seconds = float(np.median([line["seconds"] for line in lines]))
            curves.append(Curve(config.model, float(f"{config.lr:.3g}"), values, round(seconds, 2)))
        if not curves:
            raise SystemExit(f"no trial of {folder} was trained to the end: there is no curve to play")
        return cls(curves, rows[0].latest["best"], rows[0].latest["external"])

    def nearest(self, config: TrialConfig) -> Curve:
        """The curve of the same model, of any where it was not recorded, whose learning rate is nearest."""
        same = [curve for curve in self.curves if curve.model == config.model] or self.curves
        return min(same, key=lambda curve: abs(math.log(curve.lr / config.lr)))


@dataclass
class Playing:
    """One attempt on its simulated GPU."""

    launch: Launch
    values: Sequence[float]
    """By epoch."""
    epoch_seconds: float
    record: LocalRecord
    epoch: int = 0
    since: float = 0.0
    """When its GPU became its own, on the simulated clock."""


@dataclass
class Block:
    """What was measured while so many trials were asked for."""

    asks: list[float] = field(default_factory=list)
    reports: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def figures(self) -> dict[str, float]:
        count, busy = len(self.asks) + len(self.reports), sum(self.asks) + sum(self.reports)
        return {
            "ask_p50_ms": 1000 * float(np.quantile(self.asks, 0.5)),
            "ask_p99_ms": 1000 * float(np.quantile(self.asks, 0.99)),
            "report_p50_ms": 1000 * float(np.quantile(self.reports, 0.5)) if self.reports else 0.0,
            "report_p99_ms": 1000 * float(np.quantile(self.reports, 0.99)) if self.reports else 0.0,
            "decisions_per_cpu_second": count / busy,
            "wall_s": time.perf_counter() - self.started,
            "driver_mb": memory_mb(),
        }


def machines(gpus: int) -> list[Machine]:
    """Hosts with `HOST_GPUS` each, all of one kind."""
    hosts = [(f"host-{first // HOST_GPUS:04d}", min(HOST_GPUS, gpus - first)) for first in range(0, gpus, HOST_GPUS)]
    return [Machine(host, host, cores=64, cards=cards, kind="GPU", memory=80e9) for host, cards in hosts]


def memory_mb() -> float:
    """What this process holds of memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def reopen_seconds(folder: Path, config: StudyConfig, space: SearchSpace) -> float:
    """CPU time of a resume of that study before its first decision: in another process, on a copy of the ledger."""
    copy = folder / "resumed.journal"
    shutil.copyfile(folder / "ledger.journal", copy)
    with get_context("fork").Pool(1) as pool:
        seconds = pool.apply(_reopen, (copy, folder, config, space))
    copy.unlink()
    copy.with_suffix(".lock").unlink(missing_ok=True)
    return float(seconds)


def _reopen(journal: Path, folder: Path, config: StudyConfig, space: SearchSpace) -> float:
    started = time.process_time()
    Conductor(Ledger.open(journal, folder.name, "minimize"), config, space, folder / "trials").recover()
    return time.process_time() - started


class Simulation:
    """`run` yields the figures of each `block` trials asked for; `outcome` has those of the whole afterwards."""

    def __init__(
        self, folder: Path, config: StudyConfig, space: SearchSpace, gpus: int, recorded: Recorded, epoch_seconds: float
    ) -> None:
        """`epoch_seconds`: what an epoch takes in the mean over the recorded curves; some models take longer."""
        about = describe(config, Definition(script="simulated", space=space), load_pair("synthetic"))
        write_json(folder / "study.json", {"id": "simulated", "name": folder.name, "created": time.time(), **about})
        self.folder = folder
        self.config = config
        self.space = space
        self.gpus = gpus
        self.recorded = recorded
        self.scale = epoch_seconds / float(np.mean([curve.seconds for curve in recorded.curves]))
        self.conductor = Conductor(
            Ledger.open(folder / "ledger.journal", folder.name, "minimize"),
            config,
            space,
            folder / "trials",
            on_finish=lambda row: settle(Home(folder, 0.0), self.conductor, row),
        )
        hosts = machines(gpus)
        placer = Placer(self.conductor, Reservation.of(config, gpus), lambda: hosts, Needs(folder / "needs"))
        self.conductor.placing, self.conductor.slots = placer, placer.slots
        self.events: list[tuple[float, int, Playing]] = []
        self.free = 0.0
        """When the driver has decided all that it was told, on the simulated clock."""
        self.busy = 0.0
        """GPU-seconds spent in epochs."""
        self.queue_empty = 0.0
        """When the last trial was launched: idle GPUs after that have nothing to do."""
        self.busy_at_queue_empty = 0.0

    def run(self, block: int = 1000) -> Iterator[dict[str, float]]:
        """Play the study to its end."""
        now, figures = 0.0, Block()
        started = time.perf_counter()
        while True:
            while not isinstance(launch := self._decided(now, self.conductor.next_launch, figures.asks), str):
                self._start(launch, self.free)
                if len(self.conductor.rows) % block == 0:
                    yield {"trials": len(self.conductor.rows), **figures.figures(), **self._ledger()}
                    figures = Block()
            if not self.events:
                break
            now, _, playing = heapq.heappop(self.events)
            self._epoch_over(now, playing, figures.reports)
        self.makespan = self.free
        self.wall = time.perf_counter() - started

    def outcome(self) -> dict[str, float]:
        """The whole study's figures. Idle: GPUs that wait for the driver, or, at the end, for nothing."""
        whole, queued = self.gpus * self.makespan, self.gpus * self.queue_empty
        return {
            "simulated_hours": self.makespan / 3600,
            "idle_share": 1 - self.busy / whole,
            "idle_share_while_trials_wait": 1 - self.busy_at_queue_empty / queued if queued else 0.0,
            "wall_s": self.wall,
            "driver_mb": memory_mb(),
            **self._ledger(),
        }

    def _decided(self, now: float, decide: Any, times: list[float]) -> Any:
        """Make a decision of the driver's and charge what it takes to the clock."""
        start = time.thread_time()
        decision = decide()
        seconds = time.thread_time() - start
        self.free = max(self.free, now) + seconds
        if not isinstance(decision, str):
            times.append(seconds)
        return decision

    def _start(self, launch: Launch, at: float) -> None:
        curve = self.recorded.nearest(launch.config)
        rng = np.random.default_rng(launch.config.seed)
        epochs = launch.config.epochs
        spread = np.interp(np.linspace(0, 1, epochs), np.linspace(0, 1, len(curve.values)), curve.values)
        values = [float(value) for value in spread * rng.lognormal(0, 0.05)]
        folder = attempt_folder(self.folder / "trials", launch.number, launch.attempt)
        seconds = curve.seconds * self.scale * float(rng.lognormal(0, 0.1))
        playing = Playing(launch, values, seconds, LocalRecord(folder), since=at)
        heapq.heappush(self.events, (at + seconds, launch.number, playing))
        self.queue_empty, self.busy_at_queue_empty = at, self.busy

    def _epoch_over(self, now: float, playing: Playing, times: list[float]) -> None:
        playing.epoch += 1
        self.busy += playing.epoch_seconds
        report = self._report(playing, now)
        playing.record.epoch({"epoch": playing.epoch, "report": report.to_dict()})
        if self._decided(now, lambda: self.conductor.report(report), times):
            heapq.heappush(self.events, (self.free + playing.epoch_seconds, playing.launch.number, playing))

    def _report(self, playing: Playing, now: float) -> Report:
        launch, epoch, value = playing.launch, playing.epoch, playing.values[playing.epoch - 1]
        last = epoch == launch.config.epochs
        improved = epoch == 1 or value < playing.values[epoch - 2]
        tested = last or epoch in self.config.rungs(launch.config.epochs)
        best_epoch = epoch if improved else next(e for e, v in enumerate(playing.values, 1) if v == value)
        return Report(
            number=launch.number,
            attempt=launch.attempt,
            status="complete" if last else "running",
            epoch=epoch,
            value=value,
            best={**self.recorded.best, "epoch": best_epoch, "val/loss": value},
            external=self.recorded.external if tested else {},
            node=launch.place.host if launch.place else None,
            seconds=now - playing.since,
            micro_batch=launch.config.batch_size,
        )

    def _ledger(self) -> dict[str, float]:
        return {"ledger_mb": (self.folder / "ledger.journal").stat().st_size / 2**20}
