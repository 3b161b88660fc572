"""The local record of an attempt: always written, readable while it runs, whole or recognisably torn."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medtune.storage.patience import patiently

EPOCHS = "epochs.jsonl"
EVENTS = "events.jsonl"
FINAL = "final.json"
OUTCOME = "outcome.json"


class LocalRecord:
    """One attempt's own record in `folder`: a JSON line an epoch, events, and the final result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        patiently(str(folder), lambda: folder.mkdir(parents=True, exist_ok=True))

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Append one line to `epochs.jsonl`, readable at once; NaN and infinity become null."""
        self._append(EPOCHS, values)

    def event(self, kind: str, **fields: Any) -> None:
        """Append something worth knowing, with its time, to `events.jsonl`."""
        self._append(EVENTS, {"time": round(time.time(), 3), "kind": kind, **fields})

    def final(self, values: Mapping[str, Any]) -> None:
        """Write `final.json`, whole or not at all."""
        path = self.folder / FINAL
        patiently(str(path), lambda: write_json(path, values))

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        path = self.folder / name
        patiently(str(path), lambda: _append(path, values))


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The epochs' lines of an attempt so far; a line that is not whole (its writer died) is left out."""
    return list(_lines(folder / EPOCHS))


def earlier_epochs(folder: Path) -> list[dict[str, Any]]:
    """What the attempts before the one in `folder` recorded: one line an epoch, the latest attempt's, in order."""
    name, _, attempt = folder.name.rpartition("-")
    lines: dict[int, dict[str, Any]] = {}
    for number in range(1, int(attempt)) if name == "attempt" and attempt.isdigit() else ():
        lines |= {line["epoch"]: line for line in read_epochs(folder.with_name(f"attempt-{number}"))}
    return [lines[epoch] for epoch in sorted(lines)]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of an attempt so far."""
    return list(_lines(folder / EVENTS))


def read_final(folder: Path) -> dict[str, Any] | None:
    """An attempt's final result, or None if it did not get that far."""
    return read_json(folder / FINAL)


def read_outcome(trial_folder: Path) -> str | None:
    """The state that the driver gave a trial (COMPLETE, PRUNED, FAIL), or None while it has none."""
    outcome = read_json(trial_folder / OUTCOME)
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


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file whole or not at all, also where the machine stops."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w") as file:
        file.write(json.dumps(plain(values), indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None where there is no file or no object in it."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _append(path: Path, values: Mapping[str, Any]) -> None:
    line = json.dumps(plain(values), separators=(",", ":")) + "\n"
    # One write of an O_APPEND file: a reader sees the whole line or, if this process dies in it, a torn last one.
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if size and not _ends_whole(path):
            line = "\n" + line
        data = line.encode()
        if file.write(data) < len(data):
            # What a disk that is full takes of a line is taken back.
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


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
