"""Finalists in order: the mean over fresh seeds with its interval, and whether the first can be told from the others.

Two things may make a difference by chance: the images that val happens to hold, and the seeds. So a finalist is tied with
the first unless both tests tell them apart at 0.05: over the images, DeLong's or a paired bootstrap of the mean over the
seeds; over the seeds, Welch's. Each is corrected (Holm) for all pairs of finalists: the first is compared because it came
out best, so any two could have been the pair that differs most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from medtune import metrics
from medtune.choose.stage import Stage, value_of
from medtune.data.shifts import SHIFTS
from medtune.errors import ConfigError, StudyError, unknown
from medtune.evidence.comparison import delong, holm, paired_bootstrap
from medtune.metrics import Array
from medtune.predictions import Predictions
from medtune.results import predicted
from medtune.search.conductor import minimised
from medtune.search.ledger import Row

LEVEL = 0.05
SPLITS = {"cpn": "external", "cpn_matched": "external_matched"}
"""Names of figures whose split has another in the predictions."""
SELECTIONS = [f"{split}/{figure}" for split in ("val", "val_shift") for figure in ("loss", *metrics.NAMES)]
OTHERS = [f"{split}/{figure}" for split in ("test", "external", "external_matched", *SPLITS) for figure in metrics.NAMES]


def require_rankable(by: str) -> None:
    """Raises ConfigError for a figure that finalists cannot be ranked and compared by."""
    if by not in (*SELECTIONS, *OTHERS):
        raise ConfigError(unknown("metric to choose by", by, [*SELECTIONS, *OTHERS]))


@dataclass(frozen=True, eq=False)
class Finalist:
    """One configuration, trained again."""

    trial: Row
    """The study's trial that it comes from."""
    runs: list[Row]
    """Those trained to the end, in the order of their seeds."""
    failed: list[Row]
    values: list[float]
    """The figure of each run."""
    predictions: list[Predictions]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    def interval(self) -> tuple[float, float] | None:
        """95 % of the mean over the seeds (Student's t); None for fewer than two."""
        if len(self.values) < 2:
            return None
        half = stats.t.ppf(0.975, len(self.values) - 1) * stats.sem(self.values)
        return float(self.mean - half), float(self.mean + half)

    def probs(self, split: str) -> Array:
        """Probabilities (S, N, K) of a split's images: of each run, and of `val_shift` each shift of each run."""
        copies = len(SHIFTS) if split == "val_shift" else 1
        each = (np.split(metrics.softmax(found[split].logits), copies) for found in self.predictions)
        return np.stack([part for parts in each for part in parts])


def finalists_of(trials: Sequence[Row], stage: Stage, by: str) -> list[Finalist]:
    """The finalists, best first; those without a run come last. Raises StudyError when no run was trained to the end."""
    found = [_finalist(trial, rows, stage, by) for trial, rows in zip(trials, stage.runs, strict=True)]
    if not any(one.runs for one in found):
        causes = {row.cause for rows in stage.runs for row in rows}
        raise StudyError(f"no run of any finalist was trained to the end: {'; '.join(sorted(map(str, causes)))}")
    sign = 1 if minimised(by) else -1
    return sorted(found, key=lambda one: (not one.runs, sign * one.mean if one.runs else 0.0))


def _finalist(trial: Row, rows: Sequence[Row], stage: Stage, by: str) -> Finalist:
    values = {row.number: value for row in rows if (value := value_of(row, by)) is not None}
    runs = [row for row in rows if row.number in values]
    failed = [row for row in rows if row.number not in values]
    return Finalist(trial, runs, failed, list(values.values()), [_predicted(stage, row) for row in runs])


def _predicted(stage: Stage, row: Row) -> Predictions:
    found = predicted(stage.study, row)
    if found is None:
        raise StudyError(
            f"run {row.number} in {stage.study.where} was trained to the end, but its predictions.npz is gone: bring it "
            f"back from a copy, or remove {stage.study.where} to train the finalists anew"
        )
    return found


@dataclass(frozen=True)
class Compared:
    """A finalist against the first; p values are corrected for all pairs of finalists."""

    images: float
    seeds: float | None
    """None where one of both has a single run."""

    @property
    def tied(self) -> bool:
        return self.images >= LEVEL or (self.seeds is not None and self.seeds >= LEVEL)


def compare(ranked: Sequence[Finalist], by: str) -> list[Compared]:
    """Each finalist but the first, and but those without a run, against the first, in order."""
    trained = [one for one in ranked if one.runs]
    images = holm(_over_images(trained, by))
    seeds = [_over_seeds(a.values, b.values) for a, b in itertools.combinations(trained, 2)]
    corrected = iter(holm([p for p in seeds if p is not None]))
    both = [Compared(p, None if s is None else next(corrected)) for p, s in zip(images, seeds, strict=True)]
    return both[: len(trained) - 1]  # the first's pairs come first


def _over_seeds(a: Sequence[float], b: Sequence[float]) -> float | None:
    if min(len(a), len(b)) < 2:
        return None
    if np.ptp(a) == np.ptp(b) == 0:
        return 1.0 if a[0] == b[0] else 0.0
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _over_images(trained: Sequence[Finalist], by: str) -> list[float]:
    """Of each two; an image is drawn with all its shifts."""
    split, figure = by.split("/")
    split = SPLITS.get(split, split)
    probs = [one.probs(split) for one in trained]
    labels = trained[0].predictions[0][split].labels[: probs[0].shape[1]]
    if figure == "auc" and probs[0].shape[2] == 2:
        return [found.p for found in delong(probs, labels)]
    return [found.p for found in paired_bootstrap(_loss if figure == "loss" else figure, probs, labels)]


def _loss(probs: Array, labels: Any) -> float:
    return float(-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-300)).mean())
