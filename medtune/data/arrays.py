"""Arrays decoded once and kept as .npy files, then mapped into memory by every process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from medtune.data.folders import is_writable
from medtune.errors import DataError

_LAYOUT = "1"  # part of every key: raise it when what is stored for a source changes


@dataclass(frozen=True, eq=False)
class Decoded:
    """Arrays by name, and what was found out about their source while decoding, as plain JSON values."""

    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any]


def decoded(
    source: Path, stamp: Sequence[object], build: Callable[[], Decoded], folders: Sequence[Path], label: str
) -> Decoded:
    """`build()`'s arrays, from a cache entry if one was made from the same source with the same `stamp`.

    `stamp` is what changes when the source does (sizes, modification times). Entries are read from any of `folders`
    and written to the first that is writable; processes that need the same one wait for the first to make it.
    Arrays are mapped copy-on-write: writable, yet the file never changes.
    """
    family = f"{label}-{short(str(source.resolve()))}"
    entry = f"{family}-{short(json.dumps([_LAYOUT, *map(str, stamp)]))}"
    for folder in folders:
        if (found := _read(folder / entry)) is not None:
            return found
    writable = [folder for folder in folders if is_writable(folder)]
    if not writable:
        return build()
    folder = writable[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{family}.lock"):
            if (found := _read(folder / entry)) is not None:
                return found
            fresh = build()
            _write(fresh, folder, entry, family)
    except OSError as error:
        raise DataError(f"cannot keep decoded images in {folder} ({error}): free space or set --data-dir") from None
    return _read(folder / entry) or fresh


def stamp_of(path: Path) -> tuple[str, int, int]:
    """Name, bytes and modification time (ns) of a file."""
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


def short(text: str) -> str:
    """A name for `text` that is fit for files."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a small file so that readers see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.name}.", delete=False) as part:
        part.write(text)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def _read(entry: Path) -> Decoded | None:
    try:
        facts = json.loads((entry / "facts.json").read_text())
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="c") for name in facts["arrays"]}
    except (OSError, ValueError, KeyError):
        return None
    return Decoded(arrays, facts["facts"])


def _write(fresh: Decoded, folder: Path, entry: str, family: str) -> None:
    part = Path(tempfile.mkdtemp(prefix=f"{family}.part-", dir=folder))
    try:
        for name, array in fresh.arrays.items():
            with open(part / f"{name}.npy", "wb") as file:
                np.save(file, array)
                os.fsync(file.fileno())
        (part / "facts.json").write_text(json.dumps({"arrays": list(fresh.arrays), "facts": fresh.facts}, indent=1))
        part.chmod(0o755)
        for old in folder.glob(f"{family}-*"):
            shutil.rmtree(old, ignore_errors=True)
        part.rename(folder / entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)
