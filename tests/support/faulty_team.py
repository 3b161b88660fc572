"""Trials of two processes of which the second one fails in the way that $FAULTY_TEAM names, once for each file it leaves.

`die`: the process is killed in its second epoch. `memory`: more than 4 images at once do not fit, in that process alone.
`error`: it raises an error of its own. Importable, because Ray's processes import it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

import medtune.models
from medtune.parallel import Group
from medtune.team import Member, Team
from medtune.trial import AttemptSpec, MedtuneTrial
from tests.conftest import TinyNet


class FaultyNet(TinyNet):
    """Fails in training, in the process it is told to."""

    fault = ""
    batches = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and self.fault:
            self.batches += 1
            if self.fault == "memory" and len(images) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if self.fault == "error" and self.batches == 3:
                raise ValueError("this process alone")
            if self.fault == "die" and self.batches == 3 and _first_time():
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def _first_time() -> bool:
    try:
        Path(os.environ["FAULTY_TEAM_MARK"]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class FaultyMember(Member):
    """A process whose model is small, and faulty unless it is the first."""

    def begin(self, spec: str, group: Group, address: str, local: bool) -> None:
        """As a member does."""

        def build(name: str, num_classes: int, in_channels: int, **_: Any) -> FaultyNet:
            model = FaultyNet(num_classes, in_channels)
            model.fault = "" if group.leads else os.environ["FAULTY_TEAM"]
            return model

        medtune.models.build = build  # type: ignore[assignment]
        super().begin(spec, group, address, local)


class FaultyTrial(MedtuneTrial):
    """The actor of such a trial."""

    def new_team(self, spec: AttemptSpec) -> Team:
        """Of faulty processes."""
        return Team(spec.processes, spec.threads, FaultyMember)
