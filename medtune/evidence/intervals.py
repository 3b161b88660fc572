"""95 % bootstrap intervals of any figure, on the resamples that `medtune.metrics` uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from medtune import metrics
from medtune.evidence import calibration, threshold
from medtune.metrics import Array

Figure = str | Callable[[Array, Any], float]
"""A name of `medtune.metrics.NAMES`, or a function of probs (N, K) and labels (N,); names are quicker."""

RESAMPLES = 1000


class Interval(NamedTuple):
    """A figure with its 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


def in_words(found: Mapping[str, float | None]) -> str:
    """`0.912 [0.887, 0.934]` of an interval's `value`, `low` and `high`, or `undefined`."""
    if found["value"] is None:
        return "undefined"
    return f"{found['value']:.3f}" + ("" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]")


def interval(figure: Figure, probs: ArrayLike, labels: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """A figure of probs (N, K) with its percentile interval. Raises ValueError for a name that is no figure."""
    value = value_of(figure, probs, labels)
    if value is None or resamples == 0:
        return Interval(value, None, None)
    low, high = np.percentile(resampled(figure, probs, labels, resamples, seed), (2.5, 97.5))
    return Interval(value, float(low), float(high))


def value_of(figure: Figure, probs: ArrayLike, labels: ArrayLike) -> float | None:
    """A figure of the set itself; None where it is undefined."""
    values, truth = metrics.checked(probs, labels)
    if not isinstance(figure, str):
        return float(figure(values, truth))
    if figure not in metrics.NAMES:
        raise ValueError(f"figure must be one of {', '.join(metrics.NAMES)}, or a function; got {figure!r}")
    return metrics.classification(values, truth)[figure]


def resampled(figure: Figure, probs: ArrayLike, labels: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """A figure's value on every resample, (resamples,): the same images whatever the figure and the probabilities."""
    values, truth = metrics.checked(probs, labels)
    if isinstance(figure, str):
        return metrics.resampled(values, truth, resamples, seed)[figure]
    drawn = metrics.resample_indices(truth, resamples, seed)
    return np.array([figure(values[indices], truth[indices]) for indices in drawn])


def classified(
    probs: ArrayLike, labels: ArrayLike, at: float | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Every figure of probs (N, K) with its interval: at the most probable class, or of two classes at a threshold `at`.

    The AUC, which no threshold decides, is of the first alone.
    """
    decisions = probs if at is None else threshold.decided(probs, labels, at)
    values = metrics.classification(decisions, labels)
    bounds = metrics.intervals(decisions, labels, resamples, seed)
    names = metrics.NAMES if at is None else threshold.NAMES
    return {name: Interval(values[name], *(bounds[name] or (None, None))) for name in names}


def calibration_figures(
    probs: ArrayLike, labels: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """`ece` and `brier` of probs (N, K), each with its interval.

    The percentile interval of an ECE lies too high where the ECE is small: resampling adds noise, which it counts.
    """
    values = {"ece": calibration.ece(probs, labels), "brier": calibration.brier(probs, labels)}
    drawn = calibration.resampled(probs, labels, metrics.resample_indices(labels, resamples, seed))
    bounds = {name: np.percentile(found, (2.5, 97.5)) for name, found in drawn.items()}
    return {name: Interval(value, float(bounds[name][0]), float(bounds[name][1])) for name, value in values.items()}
