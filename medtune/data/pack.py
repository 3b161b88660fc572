"""A pair's images as one folder of plain files, so that they can travel to machines that have none of its own.

A pack is `<key>/` with `about.json` and two .npy files a split. The key is taken of what the pair says of itself and of its
splits' digests, so that equal keys are equal images. A pack appears under its key whole, or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from medtune.data.folders import user_folder
from medtune.data.pair import PairData, Split, digest
from medtune.errors import DataError, DataMissing
from medtune.record import read_json, write_json

_LAYOUT = 1  # part of every key: raise it when what is stored changes
KEPT = 4
"""Packs that stay in a folder, those used last."""
ABOUT = "about.json"
PACKED = "pack.json"
"""In a study's folder: the key of the pack that its trials were last given."""
_ABANDONED = 86_400.0
_SPLITS = tuple(field.name for field in dataclasses.fields(PairData) if field.type in ("Split", Split))


def packs_folder() -> Path:
    """Where this machine keeps packs: in the user's cache folder."""
    return user_folder() / "packs"


def pack(data: PairData, folder: Path | None = None) -> str:
    """Make the pack of a pair, unless a whole one is there, and return its key.

    Raises DataError when the folder cannot be written to.
    """
    folder = folder or packs_folder()
    about = _describe(data)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    with _written(folder), held(folder, key):
        if pack_digest(key, folder) is None:
            shutil.rmtree(folder / key, ignore_errors=True)
            part = fresh_part(folder, key)
            write_json(part / ABOUT, {**about, "files": dict(_write_arrays(data, part))})
            settle(folder, key)
    return key


def open_pack(key: str, folder: Path | None = None) -> PairData | None:
    """The pair in a pack, its arrays mapped copy-on-write; None where there is no such pack."""
    entry = (folder or packs_folder()) / key
    about = read_json(entry / ABOUT)
    if about is None:
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # what was used last stays
    splits = {
        name: Split(*(np.load(entry / f"{name}.{kind}.npy", mmap_mode="c") for kind in ("images", "labels")))
        for name in _SPLITS
    }
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in about["pair"].items()}
    parts: dict[str, Any] = {**splits, **plain}
    return PairData(**parts)


def or_packed(load: Callable[[], PairData], study: Path) -> PairData:
    """What `load` gives; where its files are not on this machine, what a study on a cluster left of them here.

    study: its folder. That they are the study's images is for the caller to check. Raises DataError as `load` does.
    """
    try:
        return load()
    except DataMissing:
        key = (read_json(study / PACKED) or {}).get("pack")
        data = open_pack(key) if key else None
        if data is None:
            raise
        return data


def pack_digest(key: str, folder: Path | None = None) -> str | None:
    """SHA-256 over all files of a pack that is on this machine, read in full; None where none is, or a damaged one."""
    entry = (folder or packs_folder()) / key
    about = read_json(entry / ABOUT)
    if about is None:
        return None
    whole = hashlib.sha256()
    for name, file in sorted(about["files"].items()):
        try:
            found = sha256_of(entry / name)
        except OSError:
            return None
        if found != file["sha256"]:
            return None
        whole.update(f"{name} {found}\n".encode())
    return whole.hexdigest()


def sha256_of(path: Path) -> str:
    """A file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fresh_part(folder: Path, key: str) -> Path:
    """An empty folder for a pack in the making. The caller holds the key's lock."""
    part = folder / f"{key}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def settle(folder: Path, key: str) -> None:
    """A pack in the making is whole: move it into place, and drop those not used for longest."""
    (folder / f"{key}.part").rename(folder / key)
    entries = [path for path in folder.iterdir() if path.is_dir() and path.suffix != ".part" and path.name != key]
    by_use = sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)
    for old in by_use[KEPT - 1 :]:
        # Processes that have mapped it keep what they mapped.
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob("*.part"):  # copies that were interrupted and not gone on with
        if time.time() - left.stat().st_mtime > _ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def held(folder: Path, key: str) -> Iterator[None]:
    """Alone on this machine in making the pack of that key; the kernel lets go however this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        yield


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot keep the images for other machines in {folder}: {reason}. Free space there, or set $XDG_CACHE_HOME"
        ) from None


def _describe(data: PairData) -> dict[str, Any]:
    """All of a pair but its arrays, with a digest for each split: its own where it has one."""
    plain = {k: getattr(data, k) for k in (field.name for field in dataclasses.fields(data)) if k not in _SPLITS}
    digests = {name: data.fingerprint.get(name) or digest(getattr(data, name)) for name in _SPLITS}
    return {"layout": _LAYOUT, "pair": json.loads(json.dumps(plain)), "digests": digests}


def _write_arrays(data: PairData, part: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in _SPLITS:
        split: Split = getattr(data, name)
        for kind, array in (("images", split.images), ("labels", split.labels)):
            path = part / f"{name}.{kind}.npy"
            with open(path, "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            yield path.name, {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
