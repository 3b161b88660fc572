"""Plays an attempt at a trial: python -m tests.support.wandb_trial STUDY NUMBER ATTEMPT FIRST LAST SECONDS END

END: COMPLETE, PRUNED, FAIL, INTERRUPTED, or `kill` (SIGKILL after the last epoch, `SECONDS` later).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from medtune.tracking import LocalRecord, WandbRun

CURVES = {"roc": {"fpr": [0.0, 0.1, 1.0], "tpr": [0.0, 0.8, 1.0]}, "confusion": [[9, 1], [2, 18]]}
CURVES = CURVES | {"classes": ["normal", "pneumonia"]}
CURVES = CURVES | {"matched": dict(CURVES)}


def line_of(epoch: int, external: dict[str, Any] | None = None) -> dict[str, Any]:
    """An epoch's line of the local record."""
    metrics = {"train/loss": 1 / epoch, "val/loss": 2 / epoch, "val/auc": 1 - 1 / (epoch + 1), "val/f1": None}
    about = {"epoch": epoch, "metrics": metrics, "lr": 0.001, "seconds": 0.5, "improved": True}
    return about | {"report": {"external": external or {}}}


def play(
    study: Path, number: int, attempt: int = 1, first: int = 1, last: int = 4, end: str = "COMPLETE", pause: float = 0
) -> WandbRun:
    """Epochs `first` to `last`, an external test at every second, as a trial's process does it."""
    record = LocalRecord(study / "trials" / f"{number:04d}" / f"attempt-{attempt}")
    config = {"model": "medmamba_t", "optimizer": "sgd", "lr": 0.001, "milestones": (0.25, 0.5), "selection": "val/loss"}
    run = WandbRun("st-1", number, attempt, config, study / "wandb", "proj", tags=["medmamba_t"], record=record)
    external: dict[str, Any] = {}
    for epoch in range(first, last + 1):
        time.sleep(pause)
        if epoch % 2 == 0:
            external = {"epoch": epoch, "external/auc": epoch / 10, "external/auc/low": 0.0, "external/name": "played"}
            run.external(external, CURVES)
        line = line_of(epoch, external)
        record.epoch(line)
        run.epoch(line)
    if end == "kill":
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGKILL)
    run.finish(end, {"best/val/loss": 2 / last, "external/auc": 0.9, "external/name": "played", "epoch": last})
    return run


if __name__ == "__main__":
    given = sys.argv
    play(Path(given[1]), *map(int, given[2:6]), end=given[7], pause=float(given[6]))
