"""A folder of chest X-rays in CPN X-ray's layout (NORMAL/, PNEUMONIA/, others ignored), decoded into one array."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medtune.data.arrays import Decoded, decoded, stamp_of
from medtune.data.folders import data_folder, get_command
from medtune.data.pair import Split, digest
from medtune.errors import DataError

SIDE = 256
CLASSES = ("NORMAL", "PNEUMONIA")
"""Folder names by label."""
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Member:
    """One image to decode: its name for messages, its label, and how to read its bytes."""

    name: str
    label: int
    read: Callable[[], bytes]


def class_folders(folder: Path) -> dict[str, Path]:
    """Sub-folders of `folder` by class name in capitals, those of `CLASSES` alone."""
    if not folder.is_dir():
        return {}
    found = {child.name.upper(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    return {name: found[name] for name in CLASSES if name in found}


def read(folder: Path, caches: Sequence[Path]) -> Decoded:
    """Arrays `images` uint8 (N, 1, 256, 256) and `labels`; facts `digest`, `resized` (names), `converted` (number).

    Raises DataError where the layout is not there, a class is empty, or images cannot be read (all are named).
    """
    folders = class_folders(folder)
    if len(folders) < len(CLASSES):
        have = sorted(child.name for child in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise DataError(
            f"{folder} must hold the folders {' and '.join(CLASSES)} with X-ray images, found {have}. "
            f"Name another with --external-dir, or get CPN X-ray with `{get_command(data_folder())}`"
        )
    files = {name: image_files(path) for name, path in folders.items()}
    for name, paths in files.items():
        if not paths:
            raise DataError(
                f"{folders[name]} holds no image ({', '.join(EXTENSIONS)}). "
                f"Name another folder with --external-dir, or get CPN X-ray with `{get_command(data_folder())}`"
            )
    members = [
        Member(str(path), CLASSES.index(name), path.read_bytes) for name, paths in files.items() for path in paths
    ]
    stamp = [(name, *stamp_of(path)) for name, paths in files.items() for path in paths]
    return decoded(folder, stamp, lambda: decode(members), caches, "xrays")


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder by extension, sorted by name; hidden ones left out."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    return [folder / name for name in names if name.lower().endswith(EXTENSIONS)]


def decode(members: Sequence[Member]) -> Decoded:
    """Decode into one array, grey and 256x256. Raises DataError that names every unreadable image."""
    images = np.empty((len(members), 1, SIDE, SIDE), np.uint8)
    labels = np.array([member.label for member in members], np.int64)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(_decode_into, members, images[:, 0]))
    broken = [f"{m.name}: {outcome}" for m, outcome in zip(members, outcomes, strict=True) if isinstance(outcome, str)]
    if broken:
        raise DataError(f"{len(broken)} of {len(members)} images cannot be read:\n  " + "\n  ".join(broken))
    changes = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    facts = {
        "digest": digest(Split(images, labels)),
        "resized": [m.name for m, (resized, _) in zip(members, changes, strict=True) if resized],
        "converted": sum(converted for _, converted in changes),
    }
    return Decoded({"images": images, "labels": labels}, facts)


def _decode_into(member: Member, out: NDArray[np.uint8]) -> tuple[bool, bool] | str:
    """(resized, converted to grey), or why the image cannot be read."""
    try:
        with Image.open(io.BytesIO(member.read())) as image:
            converted = image.mode != "L"
            grey = to_grey(image)
        resized = grey.size != (SIDE, SIDE)
        out[:] = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR) if resized else grey)
    except Exception as error:  # decoders raise what they like for broken files: OSError, SyntaxError, struct.error...
        return f"{type(error).__name__}: {error}"
    return resized, converted


def to_grey(image: Image.Image) -> Image.Image:
    """8-bit grey levels; 16-bit ones are scaled, where PIL alone would clip them."""
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, np.float32)
        return Image.fromarray((levels / (257 if levels.max(initial=0) > 255 else 1)).clip(0, 255).astype(np.uint8))
    return image.convert("L")


def listing(names: Iterable[str], most: int = 20) -> str:
    """All of a few names; the first of many, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
