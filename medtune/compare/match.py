"""Which trials of a study are replicates of which row of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medtune import reference
from medtune.config import TrialConfig
from medtune.reference import ReportRow
from medtune.results import Study, epochs, trial_config
from medtune.search.ledger import Row

SECTIONS: dict[str, str] = {"milestones": "schedule stepped", "constant": "as run"}
"""`TrialConfig.schedule` -> its name: the report's scripts built the schedule, and never stepped it."""


@dataclass(frozen=True)
class Trial:
    """A trial as the tables need it."""

    row: Row
    state: str
    config: TrialConfig
    figures: Mapping[str, Any] = field(default_factory=dict)
    """`train/*` and `val/*` of the last epoch, external and test figures of the best weights; of complete trials."""
    problem: str | None = None


def matches_any(config: TrialConfig, schedule: str) -> bool:
    """Whether a trial was trained at any row's model and setting, under this schedule."""
    return config.schedule == schedule and any(matches(config, row) for row in reference.report_rows())


def read_trial(study: Study, row: Row) -> Trial:
    """A row of the ledger with its configuration, and with its figures if it was trained to the end."""
    config, state = trial_config(study, row), study.state(row)
    if row.state != "COMPLETE":
        return Trial(row, state, config)
    lines = epochs(study, row)
    last = lines[-1] if lines and lines[-1]["epoch"] == config.epochs else None
    problem = None if last else f"its record does not hold its last epoch, {config.epochs}: no train and val figures"
    metrics = last.get("metrics", {}) if last else {}
    return Trial(row, state, config, {**row.latest.get("external", {}), **metrics}, problem)


def matches(config: TrialConfig, row: ReportRow) -> bool:
    """Whether a trial was trained at a row's model and setting.

    The size of images, epochs, batches and training set is no part of a setting: what differs is said above the
    tables. Under a constant schedule milestones have no effect and may be any; gamma has none either, but tells the
    appendix's rows apart.
    """
    return (
        config.model == row.model
        and config.optimizer == row.optimizer
        and math.isclose(config.lr, row.lr, rel_tol=1e-6)
        and math.isclose(config.gamma, row.gamma, rel_tol=1e-6)
        and (config.schedule == "constant" or _same_milestones(config, row))
        and (config.momentum == 0 or config.optimizer != "sgd")
        and config.weight_decay == 0
        and config.augmentation == 0
        and config.imbalance == "none"
        and config.pretrained is None
        and not config.patch_momentum
    )


def _same_milestones(config: TrialConfig, row: ReportRow) -> bool:
    """Fractions of the epochs that fall on the report's own epochs."""
    return any(
        tuple(math.floor(fraction * total + 0.5) for fraction in config.milestones) == row.milestones
        for total in reference.RECIPES[row.model].epochs
    )
