"""Real trainings of a few weights that wait where a test tells them to. Importable: Ray's processes import it.

Before the epoch that the file `hold` in the study's folder names, and each after it, they wait until it names a later one or
is gone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import medtune.models
from medtune import lifeline
from medtune.search.conductor import Report
from medtune.trial import Attempt, MedtuneTrial
from tests.conftest import TinyNet

lifeline.EVERY = 0.3


def _build(name: str, num_classes: int, in_channels: int, **_: Any) -> TinyNet:
    return TinyNet(num_classes, in_channels)


def held(study: Path) -> float:
    """The first epoch that is not to be trained yet."""
    try:
        return int((study / "hold").read_text() or 0)
    except FileNotFoundError:
        return float("inf")


class TinyAttempt(Attempt):
    """An attempt that takes its time."""

    def next_report(self) -> Report:
        """Wait, then train an epoch."""
        medtune.models.build = _build  # type: ignore[assignment]
        epoch = self.fit.epoch + 1 if self.fit else 1
        while epoch >= held(Path(self.spec.folder)):
            time.sleep(0.02)
        return super().next_report()


class TinyTrial(MedtuneTrial):
    """The actor of such a trial."""

    attempt_class: type[Attempt] = TinyAttempt
