"""Which selection metric would have ranked as the external test does: evidence for the next study, not for this choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from medtune.evidence.correlation import rank_correlation
from medtune.results import metric
from medtune.search.conductor import minimised
from medtune.search.ledger import Row

METRICS = ("val/loss", "val/auc", "val_shift/loss", "val_shift/auc")
WITH = "external/auc"
ENOUGH = 5
"""Fewer trainings say nothing about an order."""
RUNS = "the finalists' runs"
USES = "uses external labels: evidence for the next study, not for this choice"


def correlations(
    rows: Sequence[Row], over: str, external: str = WITH, metrics: Sequence[str] = METRICS
) -> list[dict[str, Any]]:
    """Spearman's rho of each selection metric with an external figure over the rows trained to the end; `over` names them.

    It is 1 where the better by the metric is always the better there: losses are turned round.
    """
    complete = [row for row in rows if row.state == "COMPLETE"]
    there = _values(complete, external)
    return [
        {
            "selection": name,
            "with": external,
            "over": over,
            **rank_correlation([-x if minimised(name) else x for x in _values(complete, name)], there)._asdict(),
        }
        for name in metrics
    ]


def _values(rows: Sequence[Row], name: str) -> list[float]:
    found = (metric(row, name) for row in rows)
    return [math.nan if value is None else value for value in found]
