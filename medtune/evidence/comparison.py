"""Whether two classifiers differ on the same images: DeLong's test, paired bootstrap, correction for several tests."""

from __future__ import annotations

import itertools
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


def delong(groups: Sequence[ArrayLike], labels: ArrayLike) -> list[Difference]:
    """Difference of the mean AUCs of each two groups of classifiers (DeLong et al. 1988, doi:10.2307/2531595).

    groups: probs (N, 2) of one classifier, or (S, N, 2) of several whose AUCs are averaged, all of the same images;
    labels (N,). In the order of `itertools.combinations`. Raises ValueError for more classes or where one is missing.
    """
    members = [_members(group) for group in groups]
    areas, covariance = auc_covariance(np.concatenate(members), labels)
    owner = np.repeat(np.arange(len(members)), [len(one) for one in members])
    weights = np.stack([(owner == place) / len(one) for place, one in enumerate(members)])  # (groups, classifiers)
    means = (weights @ areas).tolist()
    return [
        _by_normal(means[i], means[j], (weights[i] - weights[j]) @ covariance @ (weights[i] - weights[j]))
        for i, j in itertools.combinations(range(len(members)), 2)
    ]


def _by_normal(a: float, b: float, variance: float) -> Difference:
    difference, error = a - b, math.sqrt(max(0.0, variance))
    if error < 1e-9:  # the same order of images: nothing varies
        return Difference(a, b, difference, difference, difference, 1.0 if abs(difference) < 1e-9 else 0.0)
    half = norm.ppf(0.975) * error
    p = 2 * norm.sf(abs(difference) / error)
    return Difference(a, b, difference, difference - half, difference + half, float(p))


def _members(group: ArrayLike) -> Array:
    """(N, K) or (S, N, K) -> (S, N, K)."""
    values = np.asarray(group, dtype=np.float64)
    return values if values.ndim == 3 else values[None]


def auc_covariance(probs: Sequence[ArrayLike] | Array, labels: ArrayLike) -> tuple[list[float], Array]:
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
    figure: Figure, groups: Sequence[ArrayLike], labels: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> list[Difference]:
    """Difference of the mean of any figure between each two groups, as of `delong`, on the same resamples of the images.

    p is twice the smaller share of resamples at or beyond zero, and never below 2 / (resamples + 1).
    Raises ValueError where the figure is undefined.
    """
    members = [_members(group) for group in groups]
    means = [_mean(figure, one, labels) for one in members]
    drawn = [np.mean([resampled(figure, probs, labels, resamples, seed) for probs in one], axis=0) for one in members]
    return [
        _by_resamples(means[i], means[j], drawn[i] - drawn[j]) for i, j in itertools.combinations(range(len(members)), 2)
    ]


def _mean(figure: Figure, members: Array, labels: ArrayLike) -> float:
    values = [value_of(figure, probs, labels) for probs in members]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        raise ValueError(f"{figure} is undefined on these labels: nothing to compare")
    return float(np.mean(known))


def _by_resamples(a: float, b: float, differences: Array) -> Difference:
    low, high = np.percentile(differences, (2.5, 97.5))
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (1 + beyond) / (len(differences) + 1))
    return Difference(a, b, a - b, float(low), float(high), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), in the given order: none below 0.05 by chance alone in 95 %."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
