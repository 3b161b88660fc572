"""The W&B files of a study: which of them stand for its runs, and which are still to be uploaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from medtune.record import read_json, write_json
from medtune.wandb_run import MARK

UPLOADED = "uploaded.json"
"""Beside a run's file: how much of it the server has."""

QUIET_SECONDS = 120.0
"""A file that was not written to for this long has no writer: a living one notes the machine's state every 15 s."""

_EMPTY = 100
"""Bytes; a file below has no run in it yet."""


@dataclass(frozen=True)
class RunFile:
    """One attempt's file, the newest with something in it, so the whole run."""

    path: Path
    run: str
    number: int
    attempt: int
    state: str | None
    """How the attempt ended; None while it is being written, or when its process was killed."""
    size: int
    changed: float
    project: str
    """The project of W&B's that it is a run of."""

    @property
    def finished(self) -> bool:
        return self.state is not None

    @property
    def quiet(self) -> bool:
        """Whether nobody writes to it any more."""
        return self.finished or time.time() - self.changed > QUIET_SECONDS

    @property
    def uploaded(self) -> bool:
        """Whether the server has it as it is now."""
        mark = read_json(self.path.with_name(UPLOADED))
        return mark is not None and mark.get("size") == self.size

    @property
    def sweep(self) -> str | None:
        """The sweep that it was attached to since it was uploaded."""
        return (read_json(self.path.with_name(UPLOADED)) or {}).get("sweep")

    def mark_attached(self, sweep: str) -> None:
        """Note that the server has what was uploaded as one of that sweep's runs."""
        mark = self.path.with_name(UPLOADED)
        write_json(mark, (read_json(mark) or {}) | {"sweep": sweep})

    def mark_uploaded(self, size: int) -> None:
        """Note that the server has `size` bytes of it."""
        write_json(self.path.with_name(UPLOADED), {"size": size, "time": time.time()})


def run_files(study: Path, cache: dict[Path, RunFile] | None = None) -> list[RunFile]:
    """The file of each run of the study in `study`, by trial number. `cache`: finished ones, which are not read again."""
    cache = {} if cache is None else cache
    newest: dict[str, RunFile] = {}
    for path in sorted((study / "wandb").glob("*run-*/run-*.wandb")):
        file = cache.get(path) or _read(path)
        if file is None:
            continue
        if file.finished:
            cache[path] = file
        if file.run not in newest or file.attempt >= newest[file.run].attempt:
            newest[file.run] = file
    return sorted(newest.values(), key=lambda file: (file.number, file.run))


def _read(path: Path) -> RunFile | None:
    # The mark before the size: a run that is marked as ended has all of its bytes.
    mark = read_json(path.with_name(MARK)) or {}
    try:
        stat = path.stat()
    except OSError:
        return None
    if stat.st_size < _EMPTY:
        return None
    run = mark.get("run", path.stem.removeprefix("run-"))
    number, attempt = mark.get("number", -1), mark.get("attempt", 0)
    project = mark.get("project", "medtune")
    return RunFile(path, run, number, attempt, mark.get("state"), stat.st_size, stat.st_mtime, project)
