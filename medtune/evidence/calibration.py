"""How far probabilities can be taken at their word: temperature scaling, expected calibration error, Brier score.

Of two classes the probability that is judged is the positive class's, against the share of positives; of more classes it
is that of the decided class, against the share of right decisions (top-label, Guo et al. 2017, arXiv:1706.04599).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize
from scipy.stats import binomtest

from medtune.metrics import Array, checked, cross_entropy, softmax

BINS = 15
TEMPERATURES = (0.05, 20.0)
"""The temperature is looked for between these: where all decisions are right, or chance is best, there is no optimum."""


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature t, within `TEMPERATURES`, at which softmax(logits / t) has the lowest cross-entropy.

    logits (N, K), labels (N,). Above 1 the model was too sure of itself. Raises ValueError without images.
    """
    values, truth = _some(logits, labels)

    def loss(log_temperature: float) -> float:
        found = cross_entropy(values / np.exp(log_temperature), truth)
        assert found is not None  # there are images
        return found

    # Convex in 1 / t, so it has one valley in log t as well.
    found = optimize.minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def calibrated(logits: ArrayLike, temperature: float) -> Array:
    """Probabilities (N, K) at a temperature; the order of images by probability, and every decision, stay."""
    return softmax(np.asarray(logits, dtype=np.float64) / temperature)


def ece(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error: mean over images of |observed share - mean probability| of their bin, equal widths.

    Raises ValueError without images.
    """
    table = _binned(*_judged(probs, labels), bins)
    there = table.images > 0
    gaps = np.abs(table.observed[there] - table.confidence[there])
    return float(np.average(gaps, weights=table.images[there]))


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Two classes: mean squared error of the positive class's probability. More: summed over the classes (Brier 1950).

    Raises ValueError without images.
    """
    values, truth = _some(probs, labels)
    squares = (values - np.eye(values.shape[1])[truth]) ** 2
    return float(squares[:, 1].mean() if values.shape[1] == 2 else squares.sum(axis=1).mean())


class Reliability(NamedTuple):
    """A reliability diagram, each (bins,), in rising order; NaN where a bin is empty."""

    edge: Array
    """Lower end of the bin; the bins are equally wide."""
    images: NDArray[np.int64]
    confidence: Array
    """Mean probability."""
    observed: Array
    """Share that was so."""
    low: Array
    high: Array
    """95 % interval of `observed` (Wilson)."""


def reliability(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> Reliability:
    """What was observed in each bin of the probability. Raises ValueError without images."""
    table = _binned(*_judged(probs, labels), bins)
    for place in np.flatnonzero(table.images):
        hits, count = round(table.observed[place] * table.images[place]), int(table.images[place])
        table.low[place], table.high[place] = binomtest(hits, count).proportion_ci(method="wilson")
    return table


def _judged(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """The probability (N,) that is judged, and whether it came true (N,)."""
    values, truth = _some(probs, labels)
    if values.shape[1] == 2:
        return values[:, 1], truth == 1
    return values.max(axis=1), values.argmax(axis=1) == truth


def _binned(confidence: Array, true: NDArray[np.bool_], bins: int) -> Reliability:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        observed = np.bincount(place, true, bins) / count
    return Reliability(np.arange(bins) / bins, count, mean, observed, np.full(bins, np.nan), np.full(bins, np.nan))


def _some(values: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    found, truth = checked(values, labels)
    if len(truth) == 0:
        raise ValueError("calibration needs images, got none")
    return found, truth
