"""MedMNIST's 2-D single-label sets as the `medmnist` package publishes them: addresses, MD5s, reading with full checks.

BreastMNIST's labels are turned round: it has malignant as 0, and label 1 is the positive class here. Its AUC and
accuracy stay comparable with published ones, being the same either way.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medtune.data.arrays import New, decoded, stamp_of
from medtune.data.folders import get_command
from medtune.data.pair import Finding, Split, class_counts, digest
from medtune.errors import DataError, DataMissing, unknown

SPLITS = ("train", "val", "test")
CLASS_COUNTS = {
    "pneumoniamnist": {"train": (1214, 3494), "val": (135, 389), "test": (234, 390)},
    "breastmnist": {"train": (399, 147), "val": (57, 21), "test": (114, 42)},
}
"""Images per class of the official splits, labels as they are here: where known, else their sum alone is checked."""
_TURNED = ("breastmnist",)
_BLOCK = 64 << 20  # bytes of images in memory at a time
_BROKEN = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Source:
    """One published file."""

    name: str
    title: str
    file: str
    url: str
    md5: str
    native_size: int
    channels: int
    classes: tuple[str, ...]
    """Class names by label as it is here."""
    counts: Mapping[str, int]
    """Images per split."""

    @property
    def expected(self) -> str:
        """What the file holds, in words."""
        counts = ", ".join(f"{name} {n}" for name, n in self.counts.items())
        return f"MD5 {self.md5}, {counts} images of {self.native_size}x{self.native_size}"


def names() -> tuple[str, ...]:
    """The sets that can be read, as in medmnist's table."""
    return tuple(name for name in _medmnist_info() if refusal(name) is None)


def refusal(name: str) -> str | None:
    """Why a set of MedMNIST's cannot be read; None for one that can be, or that is unknown."""
    info = _medmnist_info().get(name, {})
    if name.endswith("3d"):
        return f"{info.get('python_class', name)} has volumes: models here take 2-D images"
    if "multi-label" in info.get("task", ""):
        return f"{info['python_class']} has several labels an image: models here decide for one class"
    return None


@cache
def source(name: str, native_size: int) -> Source:
    """A set at this side in px, from the installed medmnist package. Raises DataError for a name not in `names()`."""
    if name not in names():
        raise DataError(refusal(name) or unknown("MedMNIST set", name, names()))
    info = _medmnist_info()[name]
    suffix = "" if native_size == 28 else f"_{native_size}"
    labels = [info["label"][str(label)] for label in range(len(info["label"]))]
    return Source(
        name=name,
        title=info["python_class"],
        file=f"{name}{suffix}.npz",
        url=info[f"url{suffix}"],
        md5=info[f"MD5{suffix}"],
        native_size=native_size,
        channels=info["n_channels"],
        classes=tuple(reversed(labels) if name in _TURNED else labels),
        counts={split: info["n_samples"][split] for split in SPLITS},
    )


@cache
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


def read(
    wanted: Source, folder: Path, caches: list[Path], pair: str
) -> tuple[dict[str, Split], dict[str, str], list[str]]:
    """Splits by name, their digests and warnings. Raises DataError for a file that is missing or not the set.

    `pair` is the one that `medtune data get` gets the file with.
    """
    path = folder / wanted.file
    command = get_command(pair, folder, wanted.native_size)
    if not path.is_file():
        raise DataMissing(
            f"{path} is missing: {wanted.title} at {wanted.native_size} px, MD5 {wanted.md5}. Get it with `{command}`"
        )
    found = decoded(path, [stamp_of(path)], lambda new: decode(path, wanted, command, new), caches, path.stem)
    splits = {name: Split(found.arrays[f"{name}_images"], found.arrays[f"{name}_labels"]) for name in SPLITS}
    warnings = []
    if found.facts["md5"] != wanted.md5:
        warnings.append(
            f"{path} has MD5 {found.facts['md5']}, the official file has {wanted.md5}: "
            "shapes, labels and counts are right, so it is used"
        )
    return splits, found.facts["digests"], warnings


def check(wanted: Source, folder: Path, pair: str) -> Finding:
    """Read the file in full, past the cache, and verify it."""
    path = folder / wanted.file
    command = get_command(pair, folder, wanted.native_size)
    if not path.is_file():
        return Finding(str(path), f"nothing; get it with `{command}`", wanted.expected, "missing")
    try:
        found = decode(path, wanted, command, None)
    except DataError as error:
        return Finding(str(path), str(error), wanted.expected, "broken")
    what = f"MD5 {found['md5']}; keys, shapes, labels and counts are right"
    return Finding(str(path), what, wanted.expected, "ok" if found["md5"] == wanted.md5 else "note")


def decode(path: Path, wanted: Source, command: str, new: New | None) -> dict[str, Any]:
    """Fill `train_images` uint8 (N, C, H, W), `train_labels` int64 (N,), ...; facts `md5`, `digests` by split.

    Without `new`, read and verify all and keep nothing. A block of images is in memory at a time: some files hold 13 GB.
    Raises DataError for a file that is not the set, with `command` as the way out.
    """
    digests = {}
    try:
        with open(path, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    way_out = f"The official file has MD5 {wanted.md5}, this one {md5}. Remove it and run `{command}`"
    try:
        with zipfile.ZipFile(path) as npz:
            for name in SPLITS:
                labels, blocks = _verified(npz, name, wanted, str(path), way_out)
                if new is None:
                    for _ in blocks:
                        pass
                    continue
                images = new(f"{name}_images", (len(labels), wanted.channels, *2 * [wanted.native_size]), np.uint8)
                kept = new(f"{name}_labels", labels.shape, np.int64)
                kept[:] = labels
                start = 0
                for block in blocks:
                    images[start : start + len(block)] = block
                    start += len(block)
                digests[name] = digest(Split(images, kept))
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable npz file ({error}). {way_out}") from None
    return {"md5": md5, "digests": digests}


def _verified(
    npz: zipfile.ZipFile, name: str, wanted: Source, path: str, way_out: str
) -> tuple[NDArray[np.int64], Iterator[NDArray[np.uint8]]]:
    """Labels of a split and its images block by block, (n, C, H, W). Raises DataError for another content."""
    have = {member.filename.removesuffix(".npy") for member in npz.infolist()}
    if not {f"{name}_images", f"{name}_labels"} <= have:
        raise DataError(f"{path} lacks {name}_images or {name}_labels; it has {sorted(have)}. {way_out}")
    count, classes = wanted.counts[name], len(wanted.classes)
    stream, shape, dtype = _opened(npz, f"{name}_images")
    side = wanted.native_size
    right = (count, side, side) if wanted.channels == 1 else (count, side, side, wanted.channels)
    if shape != right or dtype != np.uint8:
        raise DataError(f"{path}: {name}_images must be uint8 {right}, found {dtype} {shape}. {way_out}")
    labels_stream, labels_shape, labels_dtype = _opened(npz, f"{name}_labels")
    labels = np.frombuffer(labels_stream.read(), labels_dtype)
    if labels_shape not in ((count,), (count, 1)) or len(labels) != count or not np.isin(labels, range(classes)).all():
        raise DataError(
            f"{path}: {name}_labels must be {count} labels 0 to {classes - 1}, found {len(labels)} with values "
            f"{np.unique(labels)[:5].tolist()}. {way_out}"
        )
    whole = labels.astype(np.int64)
    if wanted.name in _TURNED:
        whole = classes - 1 - whole
    known = CLASS_COUNTS.get(wanted.name, {}).get(name)
    if known and class_counts(whole, classes) != known:
        raise DataError(
            f"{path}: {name} must have {known} {' and '.join(wanted.classes)} images, found "
            f"{class_counts(whole, classes)}. {way_out}"
        )
    return whole, _blocks(stream, shape)


def _opened(npz: zipfile.ZipFile, name: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]:
    """A member at the start of its values, their shape and type. ValueError for what such files never hold."""
    stream = npz.open(f"{name}.npy")
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = header(stream)
    if by_column or dtype.hasobject:
        raise ValueError(f"{name} is stored by column or as objects")
    return stream, shape, dtype


def _blocks(stream: IO[bytes], shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """Images (N, H, W) or (N, H, W, C) of a member as (n, C, H, W). Raises ValueError where it ends early."""
    count, each = shape[0], shape[1:]
    size = int(np.prod(each))
    step = max(1, _BLOCK // size)
    for start in range(0, count, step):
        n = min(step, count - start)
        content = stream.read(n * size)
        if len(content) != n * size:
            raise ValueError(f"it ends after {start} of {count} images")
        block = np.frombuffer(content, np.uint8).reshape(n, *each)
        yield block[:, None] if len(each) == 2 else block.transpose(0, 3, 1, 2)
