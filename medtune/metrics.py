"""Figures of a classifier, with bootstrap intervals: one code path for both.

Two classes: label 1 is the positive class and its probability is `probs[:, 1]`. More classes: each figure but `oa` is
the mean over classes of its one-against-the-rest value (macro). The decision is the most probable class, the lower one
at a tie.

| figure      | definition                                              | undefined (None) when           |
| ----------- | ------------------------------------------------------- | ------------------------------- |
| oa          | right decisions / images                                | there are no images             |
| sensitivity | TP / (TP + FN)                                          | no image is positive            |
| specificity | TN / (TN + FP)                                          | no image is negative            |
| f1          | 2 TP / (2 TP + FP + FN): 0 when no positive is found     | no image is positive            |
| auc         | P(positive scores higher) + P(tie) / 2 (Mann-Whitney)   | one of both classes is missing  |

A weight per image (how often a resample drew it) turns each figure into that of the resample: nothing is sorted twice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

NAMES = ("oa", "sensitivity", "specificity", "f1", "auc")
Array = NDArray[np.float64]
_CHUNK = 64  # resamples at a time: 64 x 3,602 float64 weights stay in the cache


def softmax(logits: ArrayLike) -> Array:
    """Probabilities (N, K) in float64 of logits (N, K)."""
    values = np.asarray(logits, dtype=np.float64)
    powers = np.exp(values - values.max(axis=1, keepdims=True, initial=-np.inf))
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> float | None:
    """Mean of -log softmax(logits)[label] over logits (N, K) and labels (N,), in nats; None without images."""
    values, classes = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if len(classes) == 0:
        return None
    shifted = values - values.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return float((log_sums - shifted[np.arange(len(classes)), classes]).mean())


def checked(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Both as float64 (N, K) and int64 (N,).

    Raises ValueError for shapes that do not fit, labels outside the classes and values that are not finite.
    """
    values, truth = np.asarray(probs, dtype=np.float64), np.asarray(labels).astype(np.int64)
    if values.ndim != 2 or values.shape[1] < 2 or truth.shape != (len(values),):
        raise ValueError(f"probs must be (N, K), K at least 2, and labels (N,), got {values.shape} and {truth.shape}")
    classes = values.shape[1]
    if len(truth) and not 0 <= truth.min() <= truth.max() < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {truth.min()} to {truth.max()}")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        raise ValueError(f"probs must be finite, {bad} of {len(values)} rows are not")
    return values, truth


def classification(probs: ArrayLike, labels: ArrayLike) -> dict[str, float | None]:
    """`NAMES` of probs (N, K) against labels (N,), each in [0, 1] or None where `undefined` says why.

    Raises ValueError for shapes that do not fit, labels outside the classes and probabilities that are not finite.
    """
    scored = _Scored(probs, labels)
    reasons = scored.reasons()
    if len(reasons) == len(NAMES):
        return dict.fromkeys(NAMES)
    values = scored.figures(np.ones((1, len(scored.labels))), tuple(n for n in NAMES if n not in reasons))
    return {name: float(values[name][0]) if name in values else None for name in NAMES}


def auc_of_logit(logits: ArrayLike, labels: ArrayLike) -> float | None:
    """AUC of two classes, logits (N, 2), ranked by the raw logit of class 1; None where a class is missing.

    What the report's scripts compute. It is no ROC AUC of the decision: that ranks by the probability, so by the
    difference of both logits. Raises ValueError for other shapes, labels or logits that are not finite.
    """
    scored = _Scored(logits, labels)
    if scored.classes != 2:
        raise ValueError(f"logits must be (N, 2), got (N, {scored.classes})")
    if "auc" in scored.reasons():
        return None
    return float(scored.auc(np.ones((1, len(scored.labels))), positive=1)[0])


def undefined(labels: ArrayLike, classes: int = 2) -> dict[str, str]:
    """Why figures of these labels (N,) are None: figure -> reason; empty when all are defined."""
    values = np.asarray(labels)
    return _reasons(values, classes)


def intervals(
    probs: ArrayLike, labels: ArrayLike, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals of `NAMES` from a stratified bootstrap; None where undefined or without resamples.

    Each resample draws as many images of each class as there are, with replacement (`resample_indices`).
    """
    values = resampled(probs, labels, resamples, seed)
    if resamples == 0:
        return dict.fromkeys(NAMES)
    bounds = {name: np.percentile(drawn, (2.5, 97.5)) for name, drawn in values.items()}
    return {name: (float(bounds[name][0]), float(bounds[name][1])) if name in bounds else None for name in NAMES}


def resampled(probs: ArrayLike, labels: ArrayLike, resamples: int = 1000, seed: int = 0) -> dict[str, Array]:
    """Those of `NAMES` that are defined, each (resamples,): its value on every resample of `resample_indices`."""
    scored = _Scored(probs, labels)
    reasons = scored.reasons()
    names = tuple(name for name in NAMES if name not in reasons)
    indices = resample_indices(scored.labels, resamples, seed) if names else np.zeros((0, 0), dtype=np.int64)
    values: dict[str, list[Array]] = {name: [np.zeros(0)] for name in names}
    for start in range(0, len(indices), _CHUNK):
        figures = scored.figures(_counts(indices[start : start + _CHUNK]), names)
        for name in names:
            values[name].append(figures[name])
    return {name: np.concatenate(parts) for name, parts in values.items()}


def resample_indices(labels: ArrayLike, resamples: int, seed: int) -> NDArray[np.int64]:
    """Images (resamples, N) of the stratified bootstrap behind `intervals`."""
    values = np.asarray(labels)
    generator = np.random.default_rng(seed)
    parts = []
    for label in np.unique(values):
        members = np.flatnonzero(values == label)
        parts.append(members[generator.integers(0, len(members), (resamples, len(members)))])
    return np.concatenate(parts, axis=1) if parts else np.zeros((resamples, 0), dtype=np.int64)


def confusion(probs: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Images (K, K) by true class (row) and decided class (column)."""
    scored = _Scored(probs, labels)
    return scored.confusion(np.ones((1, len(scored.labels))))[0].astype(np.int64)


def roc(probs: ArrayLike, labels: ArrayLike, points: int = 200, positive: int = 1) -> dict[str, list[float]]:
    """ROC curve of class `positive` as {"fpr": [...], "tpr": [...]} from (0, 0) to (1, 1), at most `points` long.

    Points are spread evenly along the curve; both lists are empty when a class is missing.
    """
    scored = _Scored(probs, labels)
    truth = scored.labels == positive
    if truth.all() or not truth.any():
        return {"fpr": [], "tpr": []}
    order = np.argsort(-scored.probs[:, positive], kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scored.probs[order, positive])), len(order) - 1)
    tpr = np.append(0, np.cumsum(truth[order])[ends]) / truth.sum()
    fpr = np.append(0, np.cumsum(~truth[order])[ends]) / (~truth).sum()
    bends = (np.diff(fpr, 2) != 0) | (np.diff(tpr, 2) != 0)
    corners = np.concatenate(([0], np.flatnonzero(bends) + 1, [len(fpr) - 1]))
    if len(corners) > points:
        targets = np.linspace(0, 2, points)
        corners = corners[np.unique(np.searchsorted((fpr + tpr)[corners], targets).clip(max=len(corners) - 1))]
    return {"fpr": fpr[corners].tolist(), "tpr": tpr[corners].tolist()}


def _reasons(labels: NDArray[np.int64], classes: int) -> dict[str, str]:
    if len(labels) == 0:
        return dict.fromkeys(NAMES, "no images")
    counts = np.bincount(labels, minlength=classes)
    missing = [f"no image of class {label}" for label in range(classes) if counts[label] == 0]
    if not missing:
        return {}
    reason = ", ".join(missing)
    if classes > 2:
        return dict.fromkeys(NAMES[1:], reason)
    needs = {"sensitivity": (1,), "f1": (1,), "specificity": (0,), "auc": (0, 1)}
    return {name: reason for name, needed in needs.items() if any(counts[label] == 0 for label in needed)}


def _counts(indices: NDArray[np.int64]) -> Array:
    """How often each image was drawn: (R, N) images -> (R, N) counts."""
    resamples, images = indices.shape
    flat = indices + np.arange(resamples)[:, None] * images
    return np.bincount(flat.ravel(), minlength=resamples * images).reshape(resamples, images).astype(np.float64)


class _Scored:
    """Probabilities (N, K) and labels (N,), checked, with what sorting them yields."""

    def __init__(self, probs: ArrayLike, labels: ArrayLike) -> None:
        self.probs, self.labels = checked(probs, labels)
        self.classes = self.probs.shape[1]
        self.decided = np.eye(self.classes)[self.probs.argmax(axis=1)]  # (N, K), one 1 a row
        self._ranks: dict[int, tuple[NDArray[np.int64], ...]] = {}

    def reasons(self) -> dict[str, str]:
        return _reasons(self.labels, self.classes)

    def confusion(self, weights: Array) -> Array:
        """(R, N) weights -> (R, K, K) weighted images by true and decided class."""
        rows = [weights[:, self.labels == label] @ self.decided[self.labels == label] for label in range(self.classes)]
        return np.stack(rows, axis=1)

    def auc(self, weights: Array, positive: int) -> Array:
        """(R, N) weights -> (R,) weighted share of (positive, negative) pairs in the right order, ties counted half."""
        positives, negatives, below, up_to = self._ranked(positive)
        # Negatives drawn below each rank: (R, 1 + negatives), in rising order of their score.
        drawn = np.zeros((len(weights), 1 + len(negatives)))
        np.cumsum(weights[:, negatives], axis=1, out=drawn[:, 1:])
        chosen = weights[:, positives]
        wins = np.einsum("rp,rp->r", chosen, drawn[:, below] + drawn[:, up_to]) / 2
        return wins / (chosen.sum(axis=1) * drawn[:, -1])

    def _ranked(self, positive: int) -> tuple[NDArray[np.int64], ...]:
        if positive not in self._ranks:
            scores = self.probs[:, positive]
            positives = np.flatnonzero(self.labels == positive)
            negatives = np.flatnonzero(self.labels != positive)
            negatives = negatives[np.argsort(scores[negatives], kind="stable")]
            below = np.searchsorted(scores[negatives], scores[positives], side="left")
            up_to = np.searchsorted(scores[negatives], scores[positives], side="right")
            self._ranks[positive] = (positives, negatives, below, up_to)
        return self._ranks[positive]

    def figures(self, weights: Array, names: tuple[str, ...]) -> dict[str, Array]:
        """(R, N) weights -> the named figures, each (R,); the names must be defined ones."""
        table = self.confusion(weights)
        total = table.sum(axis=(1, 2))
        right = np.einsum("rkk->rk", table)
        actual, decided = table.sum(axis=2), table.sum(axis=1)
        positives = [1] if self.classes == 2 else list(range(self.classes))
        per_class = {
            "sensitivity": lambda k: right[:, k] / actual[:, k],
            "specificity": lambda k: (total - actual[:, k] - decided[:, k] + right[:, k]) / (total - actual[:, k]),
            "f1": lambda k: 2 * right[:, k] / (actual[:, k] + decided[:, k]),
            "auc": lambda k: self.auc(weights, k),
        }
        figures = {"oa": right.sum(axis=1) / total}
        for name in names:
            if name != "oa":
                figures[name] = np.mean([per_class[name](k) for k in positives], axis=0)
        return figures
