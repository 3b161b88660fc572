"""Which attempt at a trial is the current one, where its processes look: `trials/NNNN/current.json`.

The driver leaves it ahead of each launch. A process that was cut off from the cluster and is still at an older attempt
finds out here and ends; until then it writes into that attempt's folder, which nobody accepts any more.
"""

from __future__ import annotations

from pathlib import Path

from medtune.errors import Superseded
from medtune.record import read_json, write_json

_FILE = "current.json"


def claim(trial: Path, attempt: int) -> None:
    """Make `attempt` the current one in a trial's folder."""
    trial.mkdir(parents=True, exist_ok=True)
    write_json(trial / _FILE, {"attempt": attempt})


def require_current(trial: Path, attempt: int) -> None:
    """Raises Superseded when a later attempt is current. A storage that does not answer decides nothing."""
    try:
        found = read_json(trial / _FILE)
    except OSError:
        return
    current = (found or {}).get("attempt", attempt)
    if current > attempt:
        raise Superseded(f"attempt {attempt} goes on elsewhere as attempt {current}: its machine was taken for lost")
