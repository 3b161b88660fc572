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
from numpy.typing import DTypeLike, NDArray

from medtune.data.folders import is_writable
from medtune.errors import DataError

_LAYOUT = "1"  # part of every key: raise it when what is stored for a source changes


New = Callable[[str, tuple[int, ...], DTypeLike], NDArray[Any]]
"""Makes the array of this name, shape and type, to be filled: in the cache's files, or in memory."""
Build = Callable[[New], dict[str, Any]]
"""Fills the arrays of a source; gives what was found out about it on the way, as plain JSON values."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """Arrays by name, and what was found out about their source while decoding, as plain JSON values."""

    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any]


def in_memory(build: Build) -> Decoded:
    """What `build` makes, kept nowhere."""
    arrays: dict[str, NDArray[Any]] = {}

    def new(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        arrays[name] = np.empty(shape, dtype)
        return arrays[name]

    facts = build(new)
    return Decoded(arrays, facts)


def decoded(source: Path, stamp: Sequence[object], build: Build, folders: Sequence[Path], label: str) -> Decoded:
    """`build`'s arrays, from a cache entry if one was made from the same source with the same `stamp`.

    `stamp` is what changes when the source does (sizes, modification times). Entries are read from any of `folders`
    and written to the first that is writable, by `build` itself, so that sets larger than memory pass through;
    processes that need the same one wait for the first to make it.
    Arrays are mapped copy-on-write: writable, yet the file never changes.
    """
    family = f"{label}-{short(str(source.resolve()))}"
    entry = f"{family}-{short(json.dumps([_LAYOUT, *map(str, stamp)]))}"
    for folder in folders:
        if (found := _read(folder / entry)) is not None:
            return found
    writable = [folder for folder in folders if is_writable(folder)]
    if not writable:
        return in_memory(build)
    folder = writable[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{family}.lock"):
            if (found := _read(folder / entry)) is None:
                _write(build, folder, entry, family)
                found = _read(folder / entry)
    except OSError as error:
        raise _not_kept(folder, error) from None
    if found is None:
        raise DataError(f"{folder / entry} cannot be read back after it was written: check that disk or set --data-dir")
    return found


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


def _write(build: Build, folder: Path, entry: str, family: str) -> None:
    for left in folder.glob(f"{family}.part-*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{family}.part-", dir=folder))
    try:
        names = []

        def new(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
            names.append(name)
            try:
                return _mapped(part / f"{name}.npy", shape, np.dtype(dtype))
            except OSError as error:  # here, lest `build` takes it for a fault of what it reads
                raise _not_kept(folder, error) from None

        facts = build(new)
        for name in names:
            with open(part / f"{name}.npy", "rb+") as file:
                os.fsync(file.fileno())
        (part / "facts.json").write_text(json.dumps({"arrays": names, "facts": facts}, indent=1))
        part.chmod(0o755)
        for old in folder.glob(f"{family}-*"):
            shutil.rmtree(old, ignore_errors=True)
        part.rename(folder / entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _not_kept(folder: Path, error: OSError) -> DataError:
    return DataError(f"cannot keep decoded images in {folder} ({error}): free space or set --data-dir")


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A new .npy file as an array. OSError where the disk is too full for it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full while a mapped file is being filled kills the process
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
