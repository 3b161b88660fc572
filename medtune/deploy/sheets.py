"""Contact sheets: the surest hits and misses of a trial, each image beside what speaks for the class it was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from medtune import metrics, models
from medtune.config import TrialConfig
from medtune.data import PairData, Split
from medtune.deploy.gradcam import overlay
from medtune.deploy.source import find, images_of
from medtune.errors import StudyError
from medtune.evaluate import default_device
from medtune.predictions import Predicted
from medtune.results import Study
from medtune.search.ledger import Row

SPLITS = ("val", "external")
MOST = 12
"""Images on a sheet."""
COLUMNS = 4
SIDE = 160
LINE = 18

Tile = tuple[Image.Image, Image.Image, str]
"""An image, the same with its heat map, and what stands below."""


def contact_sheets(
    study: Study, row: Row, folder: Path, *, data_dir: Path | None = None, external_dir: Path | None = None
) -> list[Path]:
    """Write `SPLIT-hits.png` and `SPLIT-misses.png` of a trial for val and the external set; those that have an image.

    Decided is the most probable class. Raises StudyError for a trial without weights or predictions, or a folder that
    cannot be written; DataError for data that are missing or others.
    """
    source = find(study, row.number, None)
    data = images_of(source, data_dir, external_dir)
    model = models.build(source.config.model, num_classes=len(data.classes), in_channels=3)
    models.load_published(model, source.weights)
    model = model.eval().requires_grad_(False).to(default_device())
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in SPLITS:
            drawn = sheets(source.config, model, data, name, source.predictions[name])
            for kind, sheet in drawn.items():
                written.append(folder / f"{name}-{kind}.png")
                sheet.save(written[-1])
    except OSError as error:
        raise StudyError(f"cannot write {folder}: {error.strerror or error}. Name another folder with -o") from None
    return written


def sheets(
    config: TrialConfig, model: nn.Module, data: PairData, name: str, found: Predicted, most: int = MOST
) -> dict[str, Image.Image]:
    """`hits` and `misses` among a split's images, at most `most` on each; those that have an image."""
    probs = metrics.softmax(found.logits)
    split: Split = getattr(data, name)
    return {
        kind: contact_sheet([_tile(config, model, split, data.classes, probs, i) for i in chosen], f"{name}: surest {kind}")
        for kind, chosen in surest(probs, found.labels, most).items()
        if len(chosen)
    }


def surest(probs: NDArray[np.float64], labels: NDArray[np.int64], most: int = MOST) -> dict[str, NDArray[np.int64]]:
    """Indices of at most `most` hits and misses, surest first and every decided class in turn, of probs (N, K)."""
    decided, sure = probs.argmax(axis=1), probs.max(axis=1)
    found = {}
    for kind, of_kind in (("hits", decided == labels), ("misses", decided != labels)):
        indices = np.flatnonzero(of_kind)
        indices = indices[np.argsort(-sure[indices], kind="stable")]
        place = np.zeros(len(indices))
        for label in np.unique(decided[indices]):
            same = decided[indices] == label
            place[same] = np.arange(same.sum())
        found[kind] = indices[np.argsort(place, kind="stable")][:most]
    return found


def contact_sheet(tiles: Sequence[Tile], title: str) -> Image.Image:
    """Tiles in rows of `COLUMNS` below a title."""
    rows = -(-len(tiles) // COLUMNS)
    wide, high = 2 * SIDE + 8, SIDE + LINE + 8
    sheet = Image.new("RGB", (COLUMNS * wide + 8, rows * high + LINE + 16), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((8, 6), title, "black", font)
    for place, (plain, heated, words) in enumerate(tiles):
        left, top = 8 + place % COLUMNS * wide, LINE + 12 + place // COLUMNS * high
        for shift, image in ((0, plain), (SIDE, heated)):
            sheet.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), (left + shift, top))
        draw.text((left, top + SIDE + 1), words, "black", font)
    return sheet


def _tile(
    config: TrialConfig, model: nn.Module, split: Split, classes: Sequence[str], probs: NDArray[np.float64], index: int
) -> Tile:
    image = torch.tensor(np.asarray(split.images[index]))
    decided = int(probs[index].argmax())
    heated = overlay(config.model, model, image, config.image_size, decided)
    levels = image.permute(1, 2, 0).squeeze(2).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    words = f"{index}: {classes[decided]} {probs[index, decided]:.2f}, is {classes[int(split.labels[index])]}"
    return Image.fromarray(levels), heated, words
