"""Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934), stop-only: what is kept at a rung.

Ours rather than Ray's because a resumed study must decide as an uninterrupted one: the rungs are rebuilt from the ledger,
nothing is drawn at random, and a trial whose metric is undefined never counts as good. For one order of results there is
one outcome.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def keep(value: float | None, others: Sequence[float | None], reduction: int, *, minimise: bool) -> bool:
    """Whether a trial with `value` goes on past a rung that `others` reached before it.

    It goes on when it is among the best 1/`reduction` of all that reached the rung, itself included; the best always is.
    """
    if value is None or not math.isfinite(value):
        return False
    sign = 1.0 if minimise else -1.0
    better = sum(1 for other in others if other is not None and math.isfinite(other) and sign * other <= sign * value)
    return better < max(1, (len(others) + 1) // reduction)
