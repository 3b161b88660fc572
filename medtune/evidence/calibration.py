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
"""The temperature is looked for between these: where chance is best there is no optimum."""


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature t, within `TEMPERATURES`, at which softmax(logits / t) has the lowest cross-entropy.

    logits (N, K), labels (N,). Above 1 the model was too sure of itself. Where every decision is right it is 1: the loss
    falls with the temperature without end, and images without an error say nothing of how rare errors are.
    Raises ValueError without images.
    """
    values, truth = _some(logits, labels)
    if (values.argmax(axis=1) == truth).all():
        return 1.0

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
    place, gaps = _gaps(probs, labels, bins)
    return float(np.abs(np.bincount(place, gaps, bins)).sum() / len(gaps))


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Two classes: mean squared error of the positive class's probability. More: summed over the classes (Brier 1950).

    Raises ValueError without images.
    """
    return float(_squares(probs, labels).mean())


def resampled(probs: ArrayLike, labels: ArrayLike, drawn: NDArray[np.int64]) -> dict[str, Array]:
    """`ece` and `brier` on resamples of the images, each (R,); drawn (R, N): which images."""
    place, gaps = _gaps(probs, labels, BINS)
    errors = [np.abs(np.bincount(place[one], gaps[one], BINS)).sum() / len(one) for one in drawn]
    return {"ece": np.array(errors), "brier": _squares(probs, labels)[drawn].mean(axis=1)}


def _gaps(probs: ArrayLike, labels: ArrayLike, bins: int) -> tuple[NDArray[np.int64], Array]:
    """Of each image the bin of its probability, and how far the outcome lies above that; each (N,)."""
    confidence, true = _judged(probs, labels)
    return _place(confidence, bins), true - confidence


def _squares(probs: ArrayLike, labels: ArrayLike) -> Array:
    """Each image's part of the Brier score, (N,)."""
    values, truth = _some(probs, labels)
    squares = (values - np.eye(values.shape[1])[truth]) ** 2
    return np.asarray(squares[:, 1] if values.shape[1] == 2 else squares.sum(axis=1))


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


def _place(confidence: Array, bins: int) -> NDArray[np.int64]:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def _binned(confidence: Array, true: NDArray[np.bool_], bins: int) -> Reliability:
    place = _place(confidence, bins)
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
