"""PneumoniaMNIST files as the `medmnist` package publishes them: addresses, MD5s, and reading with full checks."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from medtune.data.arrays import Decoded, decoded, stamp_of
from medtune.data.folders import get_command
from medtune.data.pair import Split, class_counts, digest
from medtune.errors import DataError, DataMissing

SPLITS = ("train", "val", "test")
COUNTS = {"train": (1214, 3494), "val": (135, 389), "test": (234, 390)}
"""Normal and pneumonia images of the official splits."""


@dataclass(frozen=True)
class Source:
    """One published file."""

    file: str
    url: str
    md5: str
    native_size: int


@cache
def source(native_size: int) -> Source:
    """Address and MD5 of PneumoniaMNIST at this side in px, from the installed medmnist package."""
    info = _medmnist_info()["pneumoniamnist"]
    suffix = "" if native_size == 28 else f"_{native_size}"
    return Source(f"pneumoniamnist{suffix}.npz", info[f"url{suffix}"], info[f"MD5{suffix}"], native_size)


def _medmnist_info() -> dict[str, Any]:
    # Read, not imported: importing medmnist loads torch and makes a folder in the user's home.
    spec = importlib.util.find_spec("medmnist")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the medmnist package, which has the files' addresses, is not installed: pip install medmnist")
    text = (Path(spec.submodule_search_locations[0]) / "info.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "INFO":
            info: dict[str, Any] = ast.literal_eval(node.value)
            return info
    raise DataError("the installed medmnist package has no table INFO: install medmnist 3.0.2")


def read(folder: Path, native_size: int, caches: list[Path]) -> tuple[dict[str, Split], dict[str, str], list[str]]:
    """Splits by name, their digests and warnings. Raises DataError for a file that is missing or not the set."""
    wanted = source(native_size)
    path = folder / wanted.file
    if not path.is_file():
        raise DataMissing(
            f"{path} is missing: PneumoniaMNIST at {native_size} px, MD5 {wanted.md5}. "
            f"Get it with `{get_command(folder, native_size)}`"
        )
    found = decoded(path, [stamp_of(path)], lambda: decode(path, wanted), caches, path.stem)
    splits = {name: Split(found.arrays[f"{name}_images"], found.arrays[f"{name}_labels"]) for name in SPLITS}
    warnings = []
    if found.facts["md5"] != wanted.md5:
        warnings.append(
            f"{path} has MD5 {found.facts['md5']}, the official file has {wanted.md5}: "
            "shapes, labels and counts are right, so it is used"
        )
    return splits, found.facts["digests"], warnings


def decode(path: Path, wanted: Source) -> Decoded:
    """Arrays `train_images` uint8 (N, 1, H, W), `train_labels` int64 (N,), ...; facts `md5`, `digests`. DataError."""
    arrays, digests = {}, {}
    try:
        with open(path, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    command = get_command(path.parent, wanted.native_size)
    way_out = f"The official file has MD5 {wanted.md5}, this one {md5}. Remove it and run `{command}`"
    try:
        with np.load(path) as npz:
            content = {name: npz[name] for name in npz.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable npz file ({error}). {way_out}") from None
    for name in SPLITS:
        images, labels = (content.get(f"{name}_{kind}") for kind in ("images", "labels"))
        if images is None or labels is None:
            raise DataError(f"{path} lacks {name}_images or {name}_labels; it has {sorted(content)}. {way_out}")
        shape = (sum(COUNTS[name]), wanted.native_size, wanted.native_size)
        if images.shape != shape or images.dtype != np.uint8:
            found = f"{images.dtype} {images.shape}"
            raise DataError(f"{path}: {name}_images must be uint8 {shape}, found {found}. {way_out}")
        if labels.size != shape[0] or not np.isin(labels, (0, 1)).all():
            raise DataError(
                f"{path}: {name}_labels must be {shape[0]} labels 0 or 1, found {labels.size} with values "
                f"{np.unique(labels)[:5].tolist()}. {way_out}"
            )
        labels = labels.reshape(-1).astype(np.int64)
        if class_counts(labels, 2) != COUNTS[name]:
            raise DataError(
                f"{path}: {name} must have {COUNTS[name]} normal and pneumonia images, found "
                f"{class_counts(labels, 2)}. {way_out}"
            )
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = images[:, None], labels
        digests[name] = digest(Split(images[:, None], labels))
    return Decoded(arrays, {"md5": md5, "digests": digests})
