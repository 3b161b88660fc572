"""The figures of the report that this project reproduces: its Tables 3 to 6 and its appendix 7.1 to 7.3.

`reference.csv` holds one row a table, model and setting, with the figures as they were printed. Milestones are epochs.

| table     | split | measured on                                      | at                                     |
| --------- | ----- | ------------------------------------------------ | -------------------------------------- |
| 3, 7.1    | train | PneumoniaMNIST's training images, while training | the last epoch, as the scripts print   |
| 4, 7.2    | val   | PneumoniaMNIST's validation images               | the last epoch                         |
| 5, 7.3    | cpn   | CPN X-ray, NORMAL and PNEUMONIA                  | the epoch with the best val accuracy   |
| 6         | train | the training images; authors' figures: own test  | the last epoch                         |

Table 6 says "PneumoniaMNIST" alone: its own figures are those of Table 3 in three digits, so they are the training
split's, while the architectures' authors publish figures of the test split (`authors_*`). One differs: MedMamba-s has
OA 0.947 there and 0.9446 in Table 3.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from typing import Literal

from medtune.recipes import report_models

METRICS = ("oa", "sensitivity", "specificity", "f1", "auc", "loss", "authors_oa", "authors_auc")
MODELS = {
    "medmamba_t": "MedMamba-t",
    "medmamba_s": "MedMamba-s",
    "medmamba_b": "MedMamba-b",
    "medvit_small": "MedViT-small",
    "medvit_base": "MedViT-base",
    "medvit_large": "MedViT-large",
    "resnet50": "ResNet50",
}
"""The models of the report, and its names for them."""

IMAGE_SIZE = 224
NATIVE_SIZE = 28
TRAIN_IMAGES = 4708


@dataclass(frozen=True)
class Recipe:
    """What a model was trained with, where the report and its scripts differ: either."""

    epochs: tuple[int, ...]
    batch_size: tuple[int, ...]


def _recipes() -> dict[str, Recipe]:
    """The report's, then its scripts' where they differ."""
    runs = [one for as_run in (False, True) for one in report_models(as_run=as_run)]
    found: dict[str, Recipe] = {}
    for model in MODELS:
        own = [one for one in runs if one["model"] == model]
        epochs, batch_size = (tuple(dict.fromkeys(one[name] for one in own)) for name in ("epochs", "batch_size"))
        found[model] = Recipe(epochs, batch_size)
    return found


RECIPES = _recipes()
_OPTIMIZERS = {"adam": "Adam", "sgd": "SGD"}


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One row of a table: a model at a setting, and its figures."""

    table: str
    split: Literal["train", "val", "cpn"]
    model: str
    optimizer: str
    lr: float
    milestones: tuple[int, ...]
    """Epochs of the report's own training, not fractions."""
    gamma: float
    figures: Mapping[str, Decimal]
    """By metric, with the digits that were printed; metrics that the table does not have are left out."""

    def describe(self) -> str:
        """What the appendix varies, in words; the milestones are the same in every row."""
        return f"{_OPTIMIZERS[self.optimizer]}, lr {self.lr:g}, gamma {self.gamma:g}"


@functools.cache
def report_rows() -> tuple[ReportRow, ...]:
    """Every row, in the report's order."""
    lines = (files("medtune") / "reference.csv").read_text().splitlines()
    return tuple(_row(line) for line in csv.DictReader(lines))


def table(name: str) -> tuple[ReportRow, ...]:
    """The rows of table "3", "4", "5", "6", "7.1", "7.2" or "7.3", in the report's order."""
    return tuple(row for row in report_rows() if row.table == name)


def _row(line: Mapping[str, str]) -> ReportRow:
    return ReportRow(
        table=line["table"],
        split=line["split"],  # type: ignore[arg-type]
        model=line["model"],
        optimizer=line["optimizer"],
        lr=float(line["lr"]),
        milestones=tuple(map(int, line["milestones"].split())),
        gamma=float(line["gamma"]),
        figures={name: Decimal(line[name]) for name in METRICS if line[name]},
    )
