"""Whether ranking by one figure ranks by another: Spearman's correlation with its interval."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata


class Correlation(NamedTuple):
    """Spearman's rho of n pairs with its 95 % interval; None where it is undefined."""

    rho: float | None
    low: float | None
    high: float | None
    n: int


def rank_correlation(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Rank correlation of x and y (N,); pairs that are not finite are left out.

    Undefined for fewer than three pairs, and where x or y never varies. The interval is Bonett and Wright's (2000,
    doi:10.1007/BF02294183), of four pairs or more: the bootstrap's has no width where few pairs are in one order by chance.
    """
    pairs = np.stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    count = pairs.shape[1]
    ranks = rankdata(pairs, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True) if count else 0.0
    spread = math.sqrt((ranks**2).sum(axis=1).prod())
    if count < 3 or spread == 0:
        return Correlation(None, None, None, count)
    rho = float((ranks[0] * ranks[1]).sum() / spread)
    if count < 4:
        return Correlation(rho, None, None, count)
    # One order has no finite interval; it is taken as half as far from it as the next, where two neighbours change places.
    most = 1 - 6 / (count * (count**2 - 1))
    inner = min(max(rho, -most), most)
    half = norm.ppf(0.975) * math.sqrt((1 + inner**2 / 2) / (count - 3))
    return Correlation(rho, math.tanh(math.atanh(inner) - half), math.tanh(math.atanh(inner) + half), count)
