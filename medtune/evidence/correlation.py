"""Whether ranking by one figure ranks by another: Spearman's correlation with a bootstrap interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from medtune.evidence.intervals import RESAMPLES
from medtune.metrics import Array


class Correlation(NamedTuple):
    """Spearman's rho of n pairs with its 95 % interval; None where it is undefined."""

    rho: float | None
    low: float | None
    high: float | None
    n: int


def rank_correlation(x: ArrayLike, y: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Correlation:
    """Rank correlation of x and y (N,); pairs that are not finite are left out.

    Undefined for fewer than three pairs, and where x or y never varies. The interval is a percentile bootstrap over pairs.
    """
    pairs = np.stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    count = pairs.shape[1]
    rho = _rhos(pairs[:, None, :])[0] if count >= 3 else np.nan
    if np.isnan(rho):
        return Correlation(None, None, None, count)
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    rhos = _rhos(pairs[:, drawn])
    low, high = np.percentile(rhos[~np.isnan(rhos)], (2.5, 97.5))
    return Correlation(float(rho), float(low), float(high), count)


def _rhos(pairs: Array) -> Array:
    """(2, R, N) -> (R,): Spearman's rho of each row; NaN where one side does not vary."""
    ranks = rankdata(pairs, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray((ranks[0] * ranks[1]).sum(axis=-1) / np.sqrt((ranks**2).sum(axis=-1).prod(axis=0)))
