"""Folders of images, one per class, decoded into one array; and a set of one's own split into three."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from medtune.data.arrays import Decoded, New, decoded, stamp_of
from medtune.data.pair import Split, digest
from medtune.errors import DataError, DataMissing

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Layout:
    """Which folders are which class, and what their images are brought to."""

    labels: Mapping[str, int]
    """Label by folder name, whichever its case; other folders are not looked at."""
    side: int
    """Side in px that images are resized to."""
    channels: int = 1
    """1: grey, 3: colour."""
    ignored: str | None = None
    """Regular expression: files with this in their name are no images of the set (masks)."""

    def takes(self, file: str) -> bool:
        """Whether a file of this name is an image of the set."""
        image = file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        return image and not (self.ignored and re.search(self.ignored, file))


@dataclass(frozen=True)
class Member:
    """One image to decode: its name for messages, its label, and how to read its bytes."""

    name: str
    label: int
    read: Callable[[], bytes]


def read_classes(folder: Path, classes: Sequence[str], side: int, channels: int, caches: Sequence[Path]) -> Split:
    """`folder`/CLASS/*.png as images uint8 (N, channels, side, side), labelled by the position in `classes`.

    `caches`: `medtune.data.folders.decoded_folders(data_dir)`. In the order of classes, then of file names.
    Raises DataMissing for a folder that is not there, DataError for images that cannot be read (all are named).
    """
    if not folder.is_dir():
        raise DataMissing(f"{folder}, which must hold the folders {' and '.join(classes)}, does not exist")
    layout = Layout({name: label for label, name in enumerate(classes)}, side, channels)
    found = read(folder, layout, caches, "Put the images there")
    return Split(found.arrays["images"], found.arrays["labels"])


def split_off(split: Split, val: float = 0.1, test: float = 0.1, seed: int = 0) -> tuple[Split, Split, Split]:
    """Training, validation and test images of one set: the same shares of every class, by `seed` alone.

    By image: where several are of one patient, split by patient before, or figures on val and test are too good.
    Raises DataError for shares that leave nothing to train on, or a class too small for an image in each part.
    """
    if val <= 0 or test <= 0 or val + test >= 1:
        raise DataError(f"val and test must be above 0 and less than 1 together, got {val} and {test}")
    rng = np.random.default_rng(seed)
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    for label in np.unique(split.labels):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        if len(members) < 3:
            raise DataError(f"class {label} has {len(members)} images; at least 3 are needed to split them")
        n_val = min(max(1, round(val * len(members))), len(members) - 2)
        n_test = min(max(1, round(test * len(members))), len(members) - 1 - n_val)
        for part, chosen in zip(parts, np.split(members, [-n_val - n_test, -n_test]), strict=True):
            part.append(chosen)
    train, validation, tested = (split.take(np.sort(np.concatenate(part))) for part in parts)
    return train, validation, tested


def class_folders(folder: Path, layout: Layout) -> dict[str, Path]:
    """Sub-folders of `folder` by class name as the layout has it."""
    if not folder.is_dir():
        return {}
    found = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    return {name: found[name.lower()] for name in layout.labels if name.lower() in found}


def image_files(folder: Path, layout: Layout) -> list[Path]:
    """Image files of a class folder, sorted by name."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and layout.takes(entry.name))
    return [folder / name for name in names]


def read(folder: Path, layout: Layout, caches: Sequence[Path], way_out: str) -> Decoded:
    """Arrays `images` uint8 (N, C, side, side) and `labels`; facts `digest`, `resized` (names), `converted` (number).

    Raises DataError where the layout is not there, a class is empty, or images cannot be read (all are named).
    """
    folders = class_folders(folder, layout)
    if len(folders) < len(layout.labels):
        have = sorted(child.name for child in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise DataError(f"{folder} must hold the folders {' and '.join(layout.labels)} with images, found {have}. {way_out}")
    files = {name: image_files(path, layout) for name, path in folders.items()}
    for name, paths in files.items():
        if not paths:
            raise DataError(f"{folders[name]} holds no image ({', '.join(EXTENSIONS)}). {way_out}")
    members = [
        Member(str(path), layout.labels[name], path.read_bytes) for name, paths in files.items() for path in paths
    ]
    stamp = [repr(layout), *((name, *stamp_of(path)) for name, paths in files.items() for path in paths)]
    label = f"images-{layout.side}-{layout.channels}"
    return decoded(folder, stamp, lambda new: decode(members, layout, new), caches, label)


def decode(members: Sequence[Member], layout: Layout, new: New) -> dict[str, Any]:
    """Fill `images` and `labels`; see `read`. Raises DataError that names every unreadable image."""
    images = new("images", (len(members), layout.channels, layout.side, layout.side), np.uint8)
    labels = new("labels", (len(members),), np.int64)
    labels[:] = [member.label for member in members]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(_decode_into, members, images))
    broken = [f"{m.name}: {outcome}" for m, outcome in zip(members, outcomes, strict=True) if isinstance(outcome, str)]
    if broken:
        raise DataError(f"{len(broken)} of {len(members)} images cannot be read:\n  " + "\n  ".join(broken))
    changes = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    return {
        "digest": digest(Split(images, labels)),
        "resized": [m.name for m, (resized, _) in zip(members, changes, strict=True) if resized],
        "converted": sum(converted for _, converted in changes),
    }


def _decode_into(member: Member, out: NDArray[np.uint8]) -> tuple[bool, bool] | str:
    """(resized, converted to grey or colour), or why the image cannot be read; `out` is (C, side, side)."""
    channels, side = out.shape[:2]
    try:
        with Image.open(io.BytesIO(member.read())) as image:
            converted = image.mode != ("L" if channels == 1 else "RGB")
            levels = to_levels(image, channels)
        resized = levels.size != (side, side)
        out[:] = to_array(levels, side, side)
    except Exception as error:  # decoders raise what they like for broken files: OSError, SyntaxError, struct.error...
        return f"{type(error).__name__}: {error}"
    return resized, converted


def to_levels(image: Image.Image, channels: int) -> Image.Image:
    """8-bit grey (1 channel) or RGB (3), turned the way up that its EXIF says."""
    image = ImageOps.exif_transpose(image)
    return to_grey(image) if channels == 1 else to_colour(image)


def to_array(levels: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """8-bit grey or RGB as uint8 (C, height, width), squeezed or stretched to it where its size is another."""
    if levels.size != (width, height):
        levels = levels.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(levels).reshape(height, width, -1).transpose(2, 0, 1)


def to_grey(image: Image.Image) -> Image.Image:
    """8-bit grey levels; 16-bit ones are scaled, where PIL alone would clip them."""
    if _is_deep(image):
        levels = np.asarray(image, np.float32)
        return Image.fromarray((levels / (257 if levels.max(initial=0) > 255 else 1)).clip(0, 255).astype(np.uint8))
    return image.convert("L")


def to_colour(image: Image.Image) -> Image.Image:
    """8-bit RGB; grey images have three equal channels."""
    return to_grey(image).convert("RGB") if _is_deep(image) else image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def listing(names: Iterable[str], most: int = 20) -> str:
    """All of a few names; the first of many, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
