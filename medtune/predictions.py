"""A trial's logits, image by image, as its best weights gave them: what intervals, curves and comparisons are made from.

One small file beside an attempt's final result (`predictions.npz`, arrays alone), written before it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtune.errors import StudyError
from medtune.storage.patience import patiently

FILE = "predictions.npz"


@dataclass(frozen=True, eq=False)
class Predicted:
    """Logits float32 (N, K) of a split's images, in the split's order, and their labels int64 (N,)."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


Predictions = Mapping[str, Predicted]
"""By split: `val`, `test`, `external`, `external_matched` (the external images at the training images' resolution), and
`val_shift`: the val images under each simulated shift of `medtune.data.shifts`, shift by shift."""


def write(folder: Path, predictions: Predictions) -> None:
    """Write an attempt's file, whole or not at all."""
    arrays = {f"{name}/{part}": getattr(found, part) for name, found in predictions.items() for part in ("logits", "labels")}

    def whole() -> None:
        part = folder / f"{FILE}.part"
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / FILE)

    patiently(str(folder / FILE), whole)


def read(folder: Path) -> Predictions | None:
    """An attempt's predictions; None where it has none. Raises StudyError for a file that is damaged."""
    try:
        with np.load(folder / FILE, allow_pickle=False) as file:
            names = dict.fromkeys(key.rpartition("/")[0] for key in file.files)
            return {name: Predicted(file[f"{name}/logits"], file[f"{name}/labels"]) for name in names}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StudyError(f"{folder / FILE} is damaged ({type(error).__name__}: {error})") from None
