"""Many images through a bundle: each file has its line, also the ones that cannot be read."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from medtune.deploy.images import read_image
from medtune.deploy.predictor import Prediction, Predictor
from medtune.errors import ImageError

AT_ONCE = 32
"""Images that are read and predicted together."""


@dataclass(frozen=True)
class Answer:
    """What became of one file: a prediction, or why there is none."""

    path: Path
    prediction: Prediction | None
    error: str | None
    heat_map: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `path`, `error`, and the prediction's own."""
        found = self.prediction.to_dict() if self.prediction else {}
        drawn = {"heat_map": str(self.heat_map)} if self.heat_map else {}
        return {"path": str(self.path), "error": self.error, **found, **drawn}


def predictions(predictor: Predictor, paths: Iterable[Path], heat_maps: Path | None = None) -> Iterator[Answer]:
    """Answers in the order of the paths; `heat_maps`: a folder that gets a Grad-CAM overlay of each image as PNG."""
    numbers = itertools.count()
    paths = iter(paths)
    with ThreadPoolExecutor(4) as readers:
        while batch := list(itertools.islice(paths, AT_ONCE)):
            images = list(readers.map(lambda path: _read(predictor, path), batch))
            good = [image for image in images if not isinstance(image, str)]
            found = iter(predictor.predict(good))
            for path, image in zip(batch, images, strict=True):
                number = next(numbers)
                if isinstance(image, str):
                    yield Answer(path, None, image)
                    continue
                drawn = heat_maps and heat_maps / f"{number:05d}-{_plain(path.stem)}.png"
                if drawn:
                    predictor.heat_map(image).save(drawn)
                yield Answer(path, next(found), None, drawn)


class Table:
    """A CSV with a line for each answer, written as they come."""

    def __init__(self, file: TextIO, classes: Sequence[str]) -> None:
        self.file = file
        self.classes = classes
        kinds = [f"probability {name}" for name in classes]
        self._write(["path", "decision", *kinds, "threshold", "unlike_training", "distance", "error"])

    def add(self, answer: Answer) -> None:
        """Write a line, readable at once."""
        found = answer.prediction
        if found is None:
            values: list[object] = [""] * (len(self.classes) + 4)
        else:
            kinds = [f"{found.probabilities[name]:.6f}" for name in self.classes]
            threshold = "" if found.threshold is None else f"{found.threshold:.6f}"
            unlike = "yes" if found.unlike_training else "no"
            values = [found.decision, *kinds, threshold, unlike, f"{found.distance:.4f}"]
        self._write([answer.path, *values, answer.error or ""])

    def _write(self, values: Sequence[object]) -> None:
        # csv quotes what is in its own line end: with "\n" alone a "\r" in a name would break the line for readers.
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow(values)
        self.file.write(line.getvalue().removesuffix("\r\n") + "\n")
        self.file.flush()


def _read(predictor: Predictor, path: Path) -> NDArray[np.uint8] | str:
    """An image brought to its size at once: many large ones together do not fit into memory."""
    try:
        return predictor.prepared(read_image(path)).numpy()
    except ImageError as error:
        return str(error)


def _plain(stem: str) -> str:
    return re.sub(r"[^\w.-]", "_", stem)[:80]
