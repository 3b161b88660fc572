"""Real trainings of a model of a few weights, whose epochs take $TINY_SECONDS at least; Ray's processes import it."""

from __future__ import annotations

import os
import time
from typing import Any

import medtune.models
from medtune import lifeline
from medtune.search.conductor import Report
from medtune.trial import Attempt, MedtuneTrial
from tests.conftest import TinyNet

lifeline.EVERY = 0.3


def _build(name: str, num_classes: int, in_channels: int, **_: Any) -> TinyNet:
    return TinyNet(num_classes, in_channels)


class TinyAttempt(Attempt):
    """An attempt that takes its time."""

    def next_report(self) -> Report:
        """Wait, then train an epoch."""
        medtune.models.build = _build  # type: ignore[assignment]
        time.sleep(float(os.environ.get("TINY_SECONDS", "0")))
        return super().next_report()


class TinyTrial(MedtuneTrial):
    """The actor of such a trial."""

    attempt_class: type[Attempt] = TinyAttempt
