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


def correlations(rows: Sequence[Row], over: str) -> list[dict[str, Any]]:
    """Spearman's rho of each selection metric with `WITH` over trainings that came to their end; `over` names them."""
    complete = [row for row in rows if row.state == "COMPLETE"]
    external = [_or_nan(row, WITH) for row in complete]
    return [
        {
            "selection": name,
            "with": WITH,
            "over": over,
            **rank_correlation([_or_nan(row, name) for row in complete], external)._asdict(),
            "less_is_better": minimised(name),
        }
        for name in METRICS
    ]


def _or_nan(row: Row, name: str) -> float:
    value = metric(row, name)
    return math.nan if value is None else value
