"""Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934), stop-only: what is kept at a rung.

Ours rather than Ray's because a resumed study must decide as an uninterrupted one: the rungs are rebuilt from the ledger,
nothing is drawn at random, and a trial whose metric is undefined never counts as good. For one order of results there is
one outcome.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence


class Rung:
    """The trials that reached one rung so far, kept in order: a decision takes the same time whether few did or many."""

    def __init__(self, reduction: int, *, minimise: bool) -> None:
        self.reduction = reduction
        self.sign = 1.0 if minimise else -1.0
        self.reached = 0
        self._ordered: list[float] = []
        """Finite values, the best first, less being better."""

    def add(self, value: float | None) -> None:
        """A trial reached the rung with `value`."""
        self.reached += 1
        if value is not None and math.isfinite(value):
            bisect.insort(self._ordered, self.sign * value)

    def keeps(self, value: float | None) -> bool:
        """Whether a trial with `value`, not added yet, goes on.

        It goes on when it is among the best 1/`reduction` of all that reached the rung, itself included; the best always is.
        """
        if value is None or not math.isfinite(value):
            return False
        better = bisect.bisect_right(self._ordered, self.sign * value)
        return better < max(1, (self.reached + 1) // self.reduction)


def keep(value: float | None, others: Sequence[float | None], reduction: int, *, minimise: bool) -> bool:
    """Whether a trial with `value` goes on past a rung that `others` reached before it; see `Rung.keeps`."""
    rung = Rung(reduction, minimise=minimise)
    for other in others:
        rung.add(other)
    return rung.keeps(value)
