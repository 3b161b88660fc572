"""Trials that are played, not trained: a learning curve drawn from the configuration, real records and checkpoints.

They exercise all that a study does round the training: search, ASHA, ledger, attempts, resume. `$PLAYED_SECONDS` is what an
epoch takes; 0 if unset. Every epoch played is noted in the attempt's folder, so a test can count what was done twice.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from medtune.checkpoint import CheckpointStore, Snapshot
from medtune.config import TrialConfig
from medtune.definition import Definition
from medtune.errors import MachineFault
from medtune.search.conductor import Report, attempt_folder
from medtune.search.space import Choice, Following, Real, SearchSpace
from medtune.tracking import LocalRecord
from medtune.trial import Attempt, AttemptSpec, MedtuneTrial

NUMBERS = {"lr": Real(low=1e-4, high=1e-2, log=True), "gamma": Real(low=1e-3, high=0.5, log=True)}
SPACE = SearchSpace(**NUMBERS)
FAMILIES = {"medmamba_t": 5, "resnet50": 7}
"""Epochs by model, in the study of two families."""
TWO_FAMILIES = SearchSpace(
    model=Choice(options=tuple(FAMILIES)), epochs=Following(by="model", values=FAMILIES), **NUMBERS
)


def definition(name: str = "played") -> Definition:
    """A study over two numbers."""
    return Definition(script=name, space=SPACE)


def two_families(name: str = "families") -> Definition:
    """A study over two numbers and two models, each with epochs of its own."""
    return Definition(script=name, space=TWO_FAMILIES)


def curve(config: TrialConfig, epoch: int) -> float:
    """Loss after an epoch: best near lr 1e-3 and gamma 0.1."""
    distance = abs(math.log10(config.lr / 1e-3)) + 0.3 * abs(math.log10(config.gamma / 0.1))
    return 0.1 + 0.3 * distance + 0.5 / epoch


class PlayedAttempt(Attempt):
    """An attempt without data, model or W&B."""

    def __init__(self, spec: AttemptSpec) -> None:
        self.spec = spec
        self.config = TrialConfig.from_dict(spec.config)
        self.record = LocalRecord(attempt_folder(spec.trials, spec.number, spec.attempt))
        self.ended = False
        self.started = time.perf_counter()
        self.seconds = float(os.environ.get("PLAYED_SECONDS", "0"))
        self.checkpoints = os.environ.get("PLAYED_CHECKPOINTS", "1") == "1"
        earlier = [self._folder(n) for n in range(spec.attempt - 1, 0, -1)]
        self.store = CheckpointStore(self._folder(spec.attempt), earlier=earlier)
        snapshot = self.store.newest(self.config, {}) if spec.attempt > 1 else None
        self.epoch = snapshot.epoch if snapshot else 0

    def _folder(self, attempt: int) -> Path:
        return attempt_folder(self.spec.trials, self.spec.number, attempt) / "checkpoints"

    def next_report(self) -> Report:
        """Play one epoch: wait, note, save, report."""
        self.epoch = min(self.epoch + 1, self.config.epochs)
        time.sleep(self.seconds)
        last = self.epoch == self.config.epochs
        value = curve(self.config, self.epoch)
        report = self._say("complete" if last else "running", value)
        if self.checkpoints:
            weights = {"w": torch.full((2,), float(self.epoch))}
            self.store.save(
                Snapshot(
                    epoch=self.epoch,
                    config=self.config,
                    fingerprint={},
                    model=weights,
                    optimizer={},
                    best_epoch=self.epoch,
                    best=weights,
                    progress={},
                )
            )
        running = self._say("running", value)
        self.record.epoch({"epoch": self.epoch, "attempt": self.spec.attempt, "report": running.to_dict()})
        if last:
            self.record.final(report.to_dict())
            self.ended = True
        return report

    def _say(self, status: Any, value: float) -> Report:
        return Report(
            number=self.spec.number,
            attempt=self.spec.attempt,
            status=status,
            epoch=self.epoch,
            value=value,
            best={"epoch": self.epoch, "val/loss": value},
            seconds=time.perf_counter() - self.started,
        )

    def close(self) -> None:
        """Nothing is held."""


class PlayedTrial(MedtuneTrial):
    """The actor of a played trial."""

    attempt_class: type[Attempt] = PlayedAttempt


class SpentTrial(PlayedTrial):
    """A process that is fit for one trial only, as when that trial left device memory behind."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Refuse, as `MedtuneTrial` does."""
        self.leave()
        raise MachineFault("the last trial left 1000 MB of device memory behind")
