"""What a trial leaves behind while it runs: the local record, always, and a W&B run written offline.

W&B never decides a trial's fate: its run is written to files beside the study without touching the network, and an
exception of its code turns it off for the trial. `medtune.wandb_sync` uploads the files.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

EPOCHS = "epochs.jsonl"
EVENTS = "events.jsonl"
FINAL = "final.json"
OUTCOME = "outcome.json"


class LocalRecord:
    """One attempt's own record in `folder`: a JSON line an epoch, events, and the final result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Append one line to `epochs.jsonl`, readable at once; NaN and infinity become null."""
        _append(self.folder / EPOCHS, values)

    def event(self, kind: str, **fields: Any) -> None:
        """Append something worth knowing, with its time, to `events.jsonl`."""
        _append(self.folder / EVENTS, {"time": round(time.time(), 3), "kind": kind, **fields})

    def final(self, values: Mapping[str, Any]) -> None:
        """Write `final.json`, whole or not at all."""
        part = self.folder / f"{FINAL}.part"
        with part.open("w") as file:
            file.write(json.dumps(plain(values), indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.folder / FINAL)


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The epochs' lines of an attempt so far; a line that is not whole (its writer died) is left out."""
    return list(_lines(folder / EPOCHS))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of an attempt so far."""
    return list(_lines(folder / EVENTS))


def read_final(folder: Path) -> dict[str, Any] | None:
    """An attempt's final result, or None if it did not get that far."""
    return _read_json(folder / FINAL)


def read_outcome(trial_folder: Path) -> str | None:
    """The state that the driver gave a trial (COMPLETE, PRUNED, FAIL), or None while it has none."""
    outcome = _read_json(trial_folder / OUTCOME)
    return outcome.get("state") if outcome else None


def plain(value: Any) -> Any:
    """`value` as strict JSON holds it: NaN and infinity are null, numpy's and torch's scalars are numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def _append(path: Path, values: Mapping[str, Any]) -> None:
    line = json.dumps(plain(values), separators=(",", ":")) + "\n"
    # One write of an O_APPEND file: a reader sees the whole line or, if this process dies in it, a torn last one.
    with path.open("ab", buffering=0) as file:
        if file.tell() and not _ends_whole(path):
            line = "\n" + line
        file.write(line.encode())


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    for line in raw.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class WandbRun:
    """One attempt's W&B run, written offline; see `medtune.wandb_run`."""

    def __init__(
        self,
        study_id: str,
        number: int,
        attempt: int,
        config: Mapping[str, Any],
        folder: Path,
        project: str = "medtune",
        tags: Sequence[str] = (),
        mode: Literal["offline", "off"] = "offline",
        record: LocalRecord | None = None,
    ) -> None:
        self.mode = mode

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Log an epoch's metrics; `values` holds "epoch"."""

    def external(self, metrics: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
        """Log an external test."""

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """End the run."""
