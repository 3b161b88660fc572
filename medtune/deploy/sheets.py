"""Contact sheets: the surest hits and misses of a trial, each image beside what speaks for the class it was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medtune import metrics, models
from medtune.data import Split
from medtune.deploy.gradcam import overlay
from medtune.deploy.source import Source, data_of, find
from medtune.errors import StudyError
from medtune.evaluate import default_device
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
    data = data_of(source, data_dir, external_dir)
    model = models.build(source.config.model, num_classes=len(data.classes), in_channels=3)
    models.load_published(model, source.weights)
    model = model.eval().requires_grad_(False).to(default_device())
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in SPLITS:
            probs = metrics.softmax(source.predictions[name].logits)
            for kind, chosen in surest(probs, source.predictions[name].labels).items():
                if len(chosen):
                    tiles = [_tile(source, model, getattr(data, name), data.classes, probs, i) for i in chosen]
                    written.append(contact_sheet(tiles, f"{name}: surest {kind}", folder / f"{name}-{kind}.png"))
    except OSError as error:
        raise StudyError(f"cannot write {folder}: {error.strerror or error}. Name another folder with -o") from None
    return written


def surest(probs: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Indices of at most `MOST` hits and misses, surest first and every decided class in turn, of probs (N, K)."""
    decided, sure = probs.argmax(axis=1), probs.max(axis=1)
    found = {}
    for kind, of_kind in (("hits", decided == labels), ("misses", decided != labels)):
        indices = np.flatnonzero(of_kind)
        indices = indices[np.argsort(-sure[indices], kind="stable")]
        place = np.zeros(len(indices))
        for label in np.unique(decided[indices]):
            same = decided[indices] == label
            place[same] = np.arange(same.sum())
        found[kind] = indices[np.argsort(place, kind="stable")][:MOST]
    return found


def contact_sheet(tiles: Sequence[Tile], title: str, path: Path) -> Path:
    """Write tiles in rows of `COLUMNS` below a title, as PNG."""
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
    sheet.save(path)
    return path


def _tile(
    source: Source, model: torch.nn.Module, split: Split, classes: Sequence[str], probs: NDArray[np.float64], index: int
) -> Tile:
    image = torch.tensor(np.asarray(split.images[index]))
    decided = int(probs[index].argmax())
    heated = overlay(source.config.model, model, image, source.config.image_size, decided)
    levels = image.permute(1, 2, 0).squeeze(2).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    words = f"{index}: {classes[decided]} {probs[index, decided]:.2f}, is {classes[int(split.labels[index])]}"
    return Image.fromarray(levels), heated, words
