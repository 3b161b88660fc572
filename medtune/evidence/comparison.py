"""Whether two classifiers differ on the same images: DeLong's test, paired bootstrap, correction for several tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata

from medtune.evidence.intervals import RESAMPLES, Figure, resampled, value_of
from medtune.metrics import Array, checked


class Difference(NamedTuple):
    """Of a figure between two classifiers, a - b, with its 95 % interval and the two-sided p of there being none."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


def delong(a: ArrayLike, b: ArrayLike, labels: ArrayLike) -> Difference:
    """Difference of two correlated AUCs (DeLong et al. 1988, doi:10.2307/2531595).

    a, b: probs (N, 2) of the same images; labels (N,). Raises ValueError for more classes or where one is missing.
    """
    areas, covariance = auc_covariance([a, b], labels)
    difference = areas[0] - areas[1]
    error = math.sqrt(max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    if error < 1e-12:  # the same order of images: nothing varies
        return Difference(areas[0], areas[1], difference, difference, difference, 1.0 if abs(difference) < 1e-12 else 0.0)
    half = norm.ppf(0.975) * error
    p = 2 * norm.sf(abs(difference) / error)
    return Difference(areas[0], areas[1], difference, difference - half, difference + half, float(p))


def auc_covariance(probs: Sequence[ArrayLike], labels: ArrayLike) -> tuple[list[float], Array]:
    """AUCs of M classifiers, each probs (N, 2) of the same images, and the covariance (M, M) of their estimates.

    By midranks, as Sun and Xu 2014 (doi:10.1109/LSP.2014.2337313).
    """
    placements = [_placements(one, labels) for one in probs]
    of_positives = np.stack([positives for positives, _ in placements])
    of_negatives = np.stack([negatives for _, negatives in placements])
    covariance = _covariance(of_positives) + _covariance(of_negatives)
    return [float(area) for area in of_positives.mean(axis=1)], covariance


def _placements(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """For each positive the share of negatives below it, for each negative the share of positives above it; ties half."""
    values, truth = checked(probs, labels)
    if values.shape[1] != 2:
        raise ValueError(f"DeLong's test is of two classes, got {values.shape[1]}: take the paired bootstrap")
    positive, negative = values[truth == 1, 1], values[truth == 0, 1]
    if min(len(positive), len(negative)) < 2:
        raise ValueError(f"DeLong's test needs 2 images of each class, got {len(negative)} and {len(positive)}")
    ranks = rankdata(np.concatenate([positive, negative]))
    below = (ranks[: len(positive)] - rankdata(positive)) / len(negative)
    above = 1 - (ranks[len(positive) :] - rankdata(negative)) / len(positive)
    return below, above


def _covariance(placements: Array) -> Array:
    """(M, n) -> (M, M): covariance of the means over n."""
    return np.atleast_2d(np.cov(placements)) / placements.shape[1]


def paired_bootstrap(
    figure: Figure, a: ArrayLike, b: ArrayLike, labels: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Difference of any figure between probs a and b (N, K) of the same images, on the same resamples.

    p is twice the smaller share of resamples at or beyond zero, and never below 2 / (resamples + 1).
    Raises ValueError where the figure is undefined.
    """
    values = [value_of(figure, probs, labels) for probs in (a, b)]
    if values[0] is None or values[1] is None:
        raise ValueError(f"{figure} is undefined on these labels: nothing to compare")
    differences = resampled(figure, a, labels, resamples, seed) - resampled(figure, b, labels, resamples, seed)
    low, high = np.percentile(differences, (2.5, 97.5))
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (1 + beyond) / (resamples + 1))
    return Difference(values[0], values[1], values[0] - values[1], float(low), float(high), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), in the given order: none below 0.05 by chance alone in 95 %."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
