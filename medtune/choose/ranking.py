"""Finalists in order: the mean over fresh seeds with its interval, and whether the first can be told from the others.

Two things may make a difference by chance: the images that val happens to hold, and the seeds. So a finalist is tied with
the first unless both tests tell them apart at 0.05, each corrected (Holm) for the number of finalists compared: over the
images, DeLong's or a paired bootstrap on the probabilities averaged over the seeds; over the seeds, Welch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from medtune import metrics
from medtune.choose.stage import Stage, value_of
from medtune.data.shifts import SHIFTS
from medtune.errors import ConfigError, StudyError, unknown
from medtune.evidence.comparison import delong, holm, paired_bootstrap
from medtune.evidence.intervals import value_of as figure_of
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
        """Probabilities (N, K) of a split's images, averaged over the seeds."""
        return np.mean([metrics.softmax(found[split].logits) for found in self.predictions], axis=0)


def finalists_of(trials: Sequence[Row], stage: Stage, by: str) -> list[Finalist]:
    """The finalists, best first; those without a run come last. Raises StudyError when no run was trained to the end."""
    found = [_finalist(trial, rows, stage, by) for trial, rows in zip(trials, stage.runs, strict=True)]
    if not any(one.runs for one in found):
        causes = {row.cause for rows in stage.runs for row in rows}
        raise StudyError(f"no run of any finalist was trained to the end: {'; '.join(sorted(map(str, causes)))}")
    sign = 1 if minimised(by) else -1
    return sorted(found, key=lambda one: (not one.runs, sign * one.mean if one.runs else 0.0))


def _finalist(trial: Row, rows: Sequence[Row], stage: Stage, by: str) -> Finalist:
    values = [(row, value_of(row, by)) for row in rows]
    runs = [row for row, value in values if value is not None]
    found = [logits for row in runs if (logits := predicted(stage.study, row)) is not None]
    return Finalist(
        trial, runs, [row for row in rows if row not in runs], [value for _, value in values if value is not None], found
    )


@dataclass(frozen=True)
class Compared:
    """A finalist against the first; p values are corrected for the number of comparisons."""

    images: float
    seeds: float | None
    """None where one of both has a single run."""

    @property
    def tied(self) -> bool:
        return self.images >= LEVEL or (self.seeds is not None and self.seeds >= LEVEL)


def compare(ranked: Sequence[Finalist], by: str) -> list[Compared]:
    """Each finalist but the first, and but those without a run, against the first, in order."""
    first, *others = [one for one in ranked if one.runs]
    images = holm([_over_images(first, other, by) for other in others])
    seeds = [_over_seeds(first.values, other.values) for other in others]
    several = [p for p in seeds if p is not None]
    corrected = iter(holm(several))
    return [Compared(p, None if s is None else next(corrected)) for p, s in zip(images, seeds, strict=True)]


def _over_seeds(a: Sequence[float], b: Sequence[float]) -> float | None:
    if min(len(a), len(b)) < 2:
        return None
    if np.ptp(a) == np.ptp(b) == 0:
        return 1.0 if a[0] == b[0] else 0.0
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _over_images(a: Finalist, b: Finalist, by: str) -> float:
    split, figure = by.split("/")
    split = SPLITS.get(split, split)
    labels, ours, theirs = a.predictions[0][split].labels, a.probs(split), b.probs(split)
    if split == "val_shift":
        return _over_shifted_images(ours, theirs, labels, figure)
    if figure == "auc" and ours.shape[1] == 2:
        return delong(ours, theirs, labels).p
    return paired_bootstrap(_loss if figure == "loss" else figure, ours, theirs, labels).p


def _over_shifted_images(ours: Array, theirs: Array, labels: Any, figure: str) -> float:
    """An image is drawn with all its shifts: probs (S N, K) -> (N, S K)."""
    count, classes = len(labels) // len(SHIFTS), ours.shape[1]

    def wide(probs: Array) -> Array:
        return probs.reshape(len(SHIFTS), count, classes).transpose(1, 0, 2).reshape(count, -1)

    one_shift: Callable[[Array, Any], float | None] = (
        _loss if figure == "loss" else lambda values, truth: figure_of(figure, values, truth)
    )

    def mean(values: Array, truth: Any) -> float:
        parts = np.split(values, len(SHIFTS), axis=1)
        return float(np.mean([one_shift(part, truth) for part in parts]))

    return paired_bootstrap(mean, wide(ours), wide(theirs), labels[:count]).p


def _loss(probs: Array, labels: Any) -> float:
    return float(-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-300)).mean())
