"""Images as users have them: read as the external test's were, or refused with the reason."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medtune.data.image_folder import EXTENSIONS, to_array, to_levels
from medtune.errors import ImageError

MOST_BYTES = 256 * 2**20
"""Size of a file from which on it is not read."""
MOST_PIXELS = 80_000_000
"""Pixels from which on an image is not decoded: a few KB can hold gigabytes of them."""
LARGE = 16_000_000
"""Pixels from which on images are decoded one after the other: one of the largest takes more than a GB meanwhile."""
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
"""What is decoded, by content. Pillow knows more, some of which start other programs."""
GREY = ("1", "L", "LA", "La", "F")
"""Pillow's modes without colour, beside those of 16 and 32 bits, which begin with I."""

_one_large = threading.Lock()

# Said by an error of our own, and well below what Pillow warns of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(source: Path | bytes) -> NDArray[np.uint8]:
    """A file's first image as uint8 (C, H, W), C 1 for grey and 3 for colour, the right way up; alpha is left out.

    16-bit levels are scaled to 8. Raises ImageError for a file that is missing, too large or cannot be decoded, and for
    levels that are neither 8- nor 16-bit ones: what they stand for could only be guessed.
    """
    data = source if isinstance(source, bytes) else _bytes_of(source)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = _require_size(*image.size)
            with _one_large if pixels > LARGE else contextlib.nullcontext():
                _require_levels(image)
                grey = image.mode in GREY or image.mode.startswith("I")
                levels = to_levels(image, 1 if grey else 3)
    except ImageError:
        raise
    except Exception as error:  # decoders raise what they like for broken files: OSError, SyntaxError, struct.error...
        raise ImageError(_why(data, error)) from None
    return to_array(levels, levels.height, levels.width)


def as_tested(image: NDArray[np.uint8], channels: int, height: int, width: int, native: int) -> NDArray[np.uint8]:
    """An image (C, H, W) brought to what the external test's images were: uint8 (channels, height, width).

    One of the training files' own size, `native` a side, stays as it is, as those were validated and tested on. Raises
    ImageError for what is no such image.
    """
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0] not in (1, 3) or 0 in array.shape:
        raise ImageError(f"an image must be uint8 (C, H, W) with 1 or 3 channels, got {array.dtype} {array.shape}")
    levels = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    if array.shape[1:] == (native, native):
        height = width = native
    return to_array(to_levels(levels, channels), height, width)


def image_paths(named: Iterable[Path], stdin: TextIO) -> Iterator[Path]:
    """Files named one by one, all images below folders, lines of `@list.txt`, and of stdin for `-`; in that order.

    Hidden files and folders are no images: macOS puts a `._name.png` beside each.
    """
    for path in named:
        if str(path) == "-":
            yield from _lines(stdin.read())
        elif str(path).startswith("@"):
            yield from _lines(_bytes_of(Path(str(path)[1:])).decode("utf-8-sig", "surrogateescape"))
        elif os.path.isdir(path):  # not path.is_dir(), which raises for a name that is too long
            yield from sorted(p for p in path.rglob("*") if _listed(p.relative_to(path)) and p.is_file())
        else:
            yield path


def _listed(path: Path) -> bool:
    image = path.suffix.lower() in (*EXTENSIONS, ".gif")
    return image and not any(part.startswith(".") for part in path.parts)


def _lines(text: str) -> Iterator[Path]:
    # Not splitlines: it takes further characters for ends, some of which are in names.
    return (Path(line.strip()) for line in text.split("\n") if line.strip())


def _bytes_of(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ImageError(f"the file has {size / 2**20:.0f} MB; at most {MOST_BYTES / 2**20:.0f} are read")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from None
    except ValueError as error:  # a name with a zero byte, from a list
        raise ImageError(str(error)) from None


def _require_size(width: int, height: int) -> int:
    if width * height > MOST_PIXELS:
        most = f"at most {MOST_PIXELS / 1e6:.0f} million pixels are decoded"
        raise ImageError(f"the image has {width} x {height} pixels; {most}: make it smaller")
    return width * height


def _require_levels(image: Image.Image) -> None:
    """Float and 32-bit levels must be 0 to 255, or 0 to 65535; others would be cut off to black or white unsaid."""
    if image.mode not in ("F", "I"):
        return
    levels = np.asarray(image)
    low, high = levels.min(), levels.max()  # NaN where one is
    shares = high <= 1 and not (levels == np.trunc(levels)).all()
    if shares or not (low >= 0 and high <= 65535):
        way_out = "save it with 8 or 16 bits"
        raise ImageError(f"its levels are {low:g} to {high:g}; they must be 0 to 255, or 0 to 65535: {way_out}")


def _why(data: bytes, error: Exception) -> str:
    if data[128:132] == b"DICM":
        return "a DICOM file: convert it to PNG first"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels; at most {MOST_PIXELS / 1e6:.0f} million are decoded: make it smaller"
    return f"damaged: {type(error).__name__}: {error}"
