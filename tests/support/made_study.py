"""Studies put down by hand: a ledger and records as the real classes write them, with figures a test can compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medtune.config import StudyConfig, TrialConfig
from medtune.data import load_pair
from medtune.definition import Definition, describe
from medtune.record import LocalRecord, write_json
from medtune.results import Study, load_study
from medtune.search.conductor import attempt_folder
from medtune.search.ledger import Ledger
from medtune.search.space import Choice, Listed, SearchSpace
from medtune.training import EpochResult

METRICS = ("loss", "oa", "auc", "sensitivity", "specificity", "f1")
SPACE = SearchSpace(
    model=Choice(options=("medmamba_t", "medmamba_s", "resnet50")),
    optimizer=Choice(options=("adam", "adamw", "sgd")),
    lr=Choice(options=(1e-4, 3e-4, 1e-3, 1e-2)),
    gamma=Choice(options=(0.1, 0.001, 0.01)),
    schedule=Choice(options=("milestones", "constant")),
    momentum=Choice(options=(0.0, 0.9)),
)
BASE = {
    "model": "medmamba_s", "optimizer": "adam", "lr": 1e-3, "gamma": 0.1, "schedule": "milestones", "momentum": 0.0,
}  # fmt: skip


class MadeStudy:
    """A study in `folder` without a driver; `trial` adds one, `read` reads it back."""

    def __init__(
        self,
        folder: Path,
        *,
        verified: bool = False,
        external: str = "elsewhere",
        plan: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> None:
        """`plan`: settings of a stage of finalists, for trials of them instead of `SPACE`."""
        self.folder = folder
        self.plan = plan
        self.space = SearchSpace.of(plan, Listed) if plan else SPACE
        trial = TrialConfig(**{"pair": "synthetic", "epochs": 4} | settings)
        self.config = StudyConfig(trial=trial, first_rung=0.5)
        data = replace(load_pair("synthetic"), verified_cpn=verified, external_name=external, synthetic=False)
        about = describe(self.config, Definition(script="made", space=self.space, first=plan, planned=bool(plan)), data)
        folder.mkdir(parents=True)
        write_json(folder / "study.json", {"id": "made-1", "name": folder.name, "created": 0.0, **about})
        self.ledger = Ledger.open(folder / "ledger.journal", folder.name, "minimize")

    def trial(
        self,
        level: float,
        *,
        state: str = "COMPLETE",
        epochs: int | None = None,
        attempts: int = 1,
        more: Mapping[str, float | None] | None = None,
        external: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> int:
        """Add a trial whose figures follow from `level`; see `figure`. `more`: figures of each epoch besides."""
        config = self.config.trial
        number = self.ledger.ask(self.space, self.config, settings if self.plan else {**BASE, **settings})
        self.ledger.note(number, attempt=attempts)
        done = config.epochs if epochs is None else epochs
        for epoch in range(1, done + 1):
            attempt = 1 + (epoch - 1) * attempts // done  # each attempt trains its share of the epochs
            record = LocalRecord(attempt_folder(self.folder / "trials", number, attempt))
            record.epoch(result(level, epoch, more or {}).to_dict())
            self.ledger.record_epoch(number, epoch, figure(level, 1, "val/loss"))
        best = {"epoch": 1, **{f"val/{m}": figure(level, 1, f"val/{m}") for m in METRICS}} if done else {}
        self.ledger.note(number, latest={"best": best, "external": dict(external or {}), "seconds": {}, "node": "n"})
        if state != "RUNNING":
            cause = "TrainingDiverged: train loss is nan" if state == "FAIL" else None
            self.ledger.finish(number, state, figure(level, 1, "val/loss"), cause)
        return number

    def read(self) -> Study:
        """As the commands read it."""
        return load_study(str(self.folder))


def figure(level: float, epoch: int, name: str) -> float:
    """Every figure of every epoch is another number."""
    split, metric = name.split("/")
    return level + epoch / 100 + METRICS.index(metric) / 1000 + (0.0005 if split == "val" else 0.0)


def result(level: float, epoch: int, more: Mapping[str, float | None]) -> EpochResult:
    """An epoch of a trial whose best epoch is its first."""
    metrics = {f"{split}/{m}": figure(level, epoch, f"{split}/{m}") for split in ("train", "val") for m in METRICS}
    return EpochResult(
        epoch=epoch,
        metrics={**metrics, **more},
        lr=1e-3,
        seconds=1.0,
        images_per_second=10.0,
        best_epoch=1,
        best_value=figure(level, 1, "val/loss"),
        improved=epoch == 1,
        micro_batch=32,
    )
