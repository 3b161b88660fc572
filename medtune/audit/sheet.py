"""A contact sheet of an audit's worst pairs: one page, and the same as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medtune.data import PairData, Split
from medtune.errors import DataError

FILE = "near-duplicates.png"
_SIDE = 160
_TEXT = 48
_COLUMNS = 4


def write_sheet(record: Mapping[str, Any], data: PairData, folder: Path) -> Path | None:
    """Write the worst pairs of images as `FILE`, side by side; None where an audit found none.

    Raises DataError where `folder` cannot be written to.
    """
    if not record["worst"]:
        return None
    cells = [_cell(one, data) for one in record["worst"]]
    width, height = cells[0].size
    sheet = Image.new("RGB", (width * min(_COLUMNS, len(cells)), height * -(-len(cells) // _COLUMNS)), "white")
    for place, cell in enumerate(cells):
        sheet.paste(cell, (width * (place % _COLUMNS), height * (place // _COLUMNS)))
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}. Name another folder with -o") from None
    return path


def _cell(one: Mapping[str, Any], data: PairData) -> Image.Image:
    """Both images of a pair, and what is known of them below; red where their labels differ."""
    cell = Image.new("RGB", (2 * _SIDE + 16, _SIDE + _TEXT), "white")
    sides = ((one["of"], one["index"]), (one["among"], one["partner"]))
    for number, (name, index) in enumerate(sides):
        cell.paste(_picture(getattr(data, name), index), (number * (_SIDE + 4), 0))
    same = one["labels"][0] == one["labels"][1]
    labels = f"both {one['labels'][0]}" if same else f"{one['labels'][0]} | {one['labels'][1]}"
    like = "exact copy" if one["exact"] else f"correlation {one['correlation']:.3f}"
    text = f"{sides[0][0]} {sides[0][1]} | {sides[1][0]} {sides[1][1]}\n{like}\n{labels}"
    ImageDraw.Draw(cell).text((2, _SIDE + 2), text, "black" if same else "red", ImageFont.load_default(11))
    return cell


def _picture(split: Split, index: int) -> Image.Image:
    levels = np.asarray(split.images[index]).transpose(1, 2, 0)  # (H, W, C)
    image = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
    return image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
