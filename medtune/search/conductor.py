"""Decides what runs next, accepts or refuses what trials report, and keeps the ledger. Knows nothing of Ray.

A trial goes through here only: `next_launch` -> `report` ... -> finished, or `lost` -> `next_launch` again. All that is
needed to go on after the driver was killed is in the ledger and in the trials' folders; `recover` reads it back.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from medtune.config import StudyConfig, TrialConfig
from medtune.search.asha import Rung
from medtune.search.ledger import METRICS, Ledger, Row
from medtune.search.space import SearchSpace
from medtune.tracking import read_epochs, read_final, read_outcome

Status = Literal["running", "complete", "fail", "out_of_memory"]


@dataclass(frozen=True)
class Launch:
    """One attempt to be started."""

    number: int
    attempt: int
    config: TrialConfig
    micro_batch: int | None = None
    """Images a device computes at once at most, when an earlier attempt found that more do not fit."""

    def folder(self, trials: Path) -> Path:
        """Where this attempt writes, and nothing else does."""
        return attempt_folder(trials, self.number, self.attempt)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial's process tells the driver after an epoch, or at its end."""

    number: int
    attempt: int
    status: Status
    epoch: int = 0
    value: float | None = None
    """Selection metric at the best epoch so far."""
    best: dict[str, Any] = field(default_factory=dict)
    """Train and val metrics at the best epoch so far."""
    external: dict[str, Any] = field(default_factory=dict)
    """External and own test metrics, when this epoch was tested."""
    cause: str | None = None
    node: str | None = None
    seconds: float = 0.0
    """Time this attempt has taken so far."""
    micro_batch: int | None = None
    """Images a device computes at once; after `out_of_memory`, to be computed at once by the next attempt."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def configured(base: TrialConfig, number: int, settings: Mapping[str, Any]) -> TrialConfig:
    """What a trial is trained with; its seed is the study's and its number, unless its settings name one."""
    return base.replace(**{"seed": base.seed + number, **settings})


def trial_folder(trials: Path, number: int) -> Path:
    """A trial's folder in the study's `trials` folder."""
    return trials / f"{number:04d}"


def attempt_folder(trials: Path, number: int, attempt: int) -> Path:
    """An attempt's folder."""
    return trial_folder(trials, number) / f"attempt-{attempt}"


class Conductor:
    """The study's state machine; see the module's docstring."""

    def __init__(
        self,
        ledger: Ledger,
        config: StudyConfig,
        space: SearchSpace,
        trials: Path,
        first: Sequence[Mapping[str, Any]] = (),
        planned: bool = False,
        slots: Callable[[], int] = lambda: 1,
        on_finish: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """`first`: settings to try before the searcher proposes any; when `planned`, they are all there is.

        `slots`: how many trials may run at a time now.
        """
        self.ledger = ledger
        self.config = config
        self.space = space
        self.trials = trials
        self.first = first
        self.planned = planned
        self.slots = slots
        self.on_finish = on_finish
        self.rows: dict[int, Row] = {row.number: row for row in ledger.rows()}
        self.live: dict[int, Launch] = {}
        self.waiting: list[int] = []
        self.minimise = minimised(config.trial.selection)
        self._at_rung: dict[int, Rung] = {}
        """All trials that reached a rung, each at its own epoch, by the rung's index."""
        for row in self.rows.values():
            for index, epoch in enumerate(self._rungs(row)):
                if (record := row.rung(epoch)) is not None:
                    self._rung(index).add(record["value"])
        self.ranking = [place for row in self.rows.values() if (place := self._place(row)) is not None]
        """(value, number) of the trials that were trained to the end, the best first, less being better."""
        self.ranking.sort()

    def recover(self) -> list[str]:
        """Bring in what the last driver did not hear of; what is still unfinished will be launched again.

        Returns one line for each trial that was left unfinished.
        """
        notes = []
        for row in list(self.rows.values()):
            if row.finished:
                if read_outcome(trial_folder(self.trials, row.number)) is None:
                    self.on_finish(row)  # the driver died between ending the row and tidying up
                continue
            if row.settings is None:
                self.ledger.complete_ask(row.number, self.space, self.config)
            self._hear_folder(row)
            self._refresh(row.number)
            row = self.rows[row.number]
            if row.finished:
                notes.append(f"trial {row.number}: {row.state}, as its folder showed")
            else:
                self.waiting.append(row.number)
                notes.append(f"trial {row.number}: goes on after epoch {row.epoch} of {self._epochs(row)}")
        return notes

    def _hear_folder(self, row: Row) -> None:
        """Feed the reports that the current attempt wrote down and the driver did not take in."""
        if row.attempt == 0:
            return
        self.live[row.number] = self._launch(row.number, row.attempt)
        for epoch in self._rungs(row):
            rung = row.rung(epoch)
            if rung is not None and not rung["kept"]:
                self._finish(row.number, "PRUNED", rung["value"])
                return
        folder = attempt_folder(self.trials, row.number, row.attempt)
        reports = [line["report"] for line in read_epochs(folder) if "report" in line]
        final = read_final(folder)
        if final is not None:
            reports.append(final)
        for values in reports:
            report = Report(**values)
            # The newest epoch again: the driver may have died between writing it down and deciding its rung.
            if report.status != "running" or report.epoch >= row.epoch:
                self.report(report)
        self.live.pop(row.number, None)

    def next_launch(self) -> Launch | Literal["later", "done"]:
        """What to start now. `later`: nothing until something is reported; `done`: every trial has ended."""
        if len(self.live) >= self.slots():
            return "later"
        while self.waiting:
            number = self.waiting.pop(0)
            # Its last process may have ended after all, behind the driver's back.
            self._hear_folder(self.rows[number])
            self._refresh(number)
            if not self.rows[number].finished:
                return self._begin(number)
        if len(self.rows) < self.config.trials:
            count = len(self.rows)
            number = self.ledger.ask(self.space, self.config, self.first[count] if count < len(self.first) else None)
            return self._begin(number)
        return "later" if self.live else "done"

    def _begin(self, number: int) -> Launch:
        self._refresh(number)
        attempt = self.rows[number].attempt + 1
        self.ledger.note(number, attempt=attempt)
        self._refresh(number)
        launch = self._launch(number, attempt)
        self.live[number] = launch
        return launch

    def _launch(self, number: int, attempt: int) -> Launch:
        row = self.ledger.row(number)
        assert row.settings is not None
        config = configured(self.config.trial, number, row.settings)
        return Launch(number, attempt, config, row.attrs.get("micro_batch"))

    def epochs(self) -> list[int]:
        """The epochs of the study's trials: of each, in order, when planned, else each number that the space has."""
        if self.planned:
            return [configured(self.config.trial, 0, settings).epochs for settings in self.first[: self.config.trials]]
        return self.space.values("epochs", self.config.trial)

    def _epochs(self, row: Row) -> int:
        return row.epochs(self.config.trial.epochs)

    def _rungs(self, row: Row) -> tuple[int, ...]:
        return self.config.rungs(self._epochs(row))

    def _rung(self, index: int) -> Rung:
        return self._at_rung.setdefault(index, Rung(self.config.reduction, minimise=self.minimise))

    def _place(self, row: Row) -> tuple[float, int] | None:
        """Where a trial stands in `ranking`; None while it was not trained to the end."""
        if row.state != "COMPLETE" or row.value is None:
            return None
        return row.value if self.minimise else -row.value, row.number

    def report(self, report: Report) -> bool:
        """Take in a report; returns whether the trial goes on. Reports of an attempt that is not current are ignored."""
        launch = self.live.get(report.number)
        if launch is None or launch.attempt != report.attempt:
            return False
        with self.ledger.together():
            return self._take_in(report)

    def _take_in(self, report: Report) -> bool:
        number = report.number
        self.ledger.note(number, **_news(self.rows[number], report))
        if report.status == "fail":
            return self._finish(number, "FAIL", None, report.cause)
        if report.status == "out_of_memory":
            # No fault: it goes on at once in another attempt, from its last checkpoint.
            self.ledger.note(number, micro_batch=report.micro_batch)
            self.live.pop(number)
            self._refresh(number)
            self.waiting.insert(0, number)
            return False
        if report.value is not None:
            self.ledger.record_epoch(number, report.epoch, report.value)
        if report.status == "complete":
            if report.value is None:
                selection = self.config.trial.selection
                return self._finish(number, "FAIL", None, f"{selection} is undefined in every epoch")
            return self._finish(number, "COMPLETE", report.value)
        self._refresh(number)
        rungs = self._rungs(self.rows[number])
        if report.epoch in rungs and self.rows[number].rung(report.epoch) is None:
            index = rungs.index(report.epoch)
            rung = self._rung(index)
            kept = rung.keeps(report.value)
            self.ledger.record_rung(number, report.epoch, report.value, kept, index=index, order=rung.reached)
            rung.add(report.value)
            if not kept:
                return self._finish(number, "PRUNED", report.value)
            self._refresh(number)
        return True

    def lost(self, launch: Launch, cause: str) -> None:
        """The attempt's process or machine died. The trial is started again, within a budget of its own."""
        number = launch.number
        if self.live.get(number) != launch:
            return
        self.live.pop(number)
        faults = self.rows[number].faults + 1
        self.ledger.note(number, faults=faults)
        self._refresh(number)
        if faults > self.config.machine_faults:
            self._finish(number, "FAIL", None, f"its process or machine died {faults} times, last: {cause}")
        else:
            self.waiting.append(number)

    def _finish(self, number: int, state: str, value: float | None, cause: str | None = None) -> bool:
        self.ledger.finish(number, state, value, cause)
        self.live.pop(number, None)
        self._refresh(number)
        if (place := self._place(self.rows[number])) is not None:
            bisect.insort(self.ranking, place)
        self.on_finish(self.rows[number])
        return False

    def _refresh(self, number: int) -> None:
        self.rows[number] = self.ledger.row(number)


def _news(row: Row, report: Report) -> dict[str, Any]:
    """What a report adds to what is known of a trial besides its value."""
    latest = row.latest
    news = {
        "latest": {
            "node": report.node or latest.get("node"),
            "seconds": {**latest.get("seconds", {}), str(report.attempt): round(report.seconds, 3)},
            "micro_batch": report.micro_batch or latest.get("micro_batch"),
        }
    }
    metrics = {part: getattr(report, part) or latest.get(part) for part in METRICS}
    return news | {part: values for part, values in metrics.items() if values and values != row.attrs.get(part)}


def minimised(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.rsplit("/", 1)[-1] == "loss"
