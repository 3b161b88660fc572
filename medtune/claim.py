"""Which attempt at a trial is the current one, where its processes look: `trials/NNNN/current.json`.

The driver leaves it ahead of each launch. A process that was cut off from the cluster and is still at an older attempt
finds out here and ends; until then it writes into that attempt's folder, which nobody accepts any more.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from medtune.errors import Superseded
from medtune.record import write_json
from medtune.storage.patience import patiently

_FILE = "current.json"


def claim(trial: Path, attempt: int) -> None:
    """Make `attempt` the current one in a trial's folder."""

    def write() -> None:
        for folder in (trial.parent, trial):  # not the study's own: it is gone where the storage is
            folder.mkdir(exist_ok=True)
        write_json(trial / _FILE, {"attempt": attempt})

    patiently(f"the folder {trial}", write)


def claim_of(number: int) -> str:
    """The file in a study's folder that says which attempt at a trial is current."""
    return f"trials/{number:04d}/{_FILE}"


def require_current(trial: Path, attempt: int) -> None:
    """Raises Superseded when a later attempt is current. A storage that does not answer decides nothing."""
    with contextlib.suppress(OSError):
        require_word((trial / _FILE).read_bytes(), attempt)


def require_word(word: bytes, attempt: int) -> None:
    """Raises Superseded when the file's content makes a later attempt the current one."""
    try:
        current = int(json.loads(word)["attempt"])
    except (ValueError, KeyError, TypeError):
        return
    if current > attempt:
        raise Superseded(f"attempt {attempt} goes on elsewhere as attempt {current}: its machine was taken for lost")
