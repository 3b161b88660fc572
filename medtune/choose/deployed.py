"""The run to be deployed: temperature and threshold, set on val, and what they make of every split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from medtune import metrics
from medtune.errors import ConfigError
from medtune.evidence.calibration import calibrated, fit_temperature
from medtune.evidence.intervals import Interval, calibration_figures, classified
from medtune.evidence.threshold import Rule, choose_threshold
from medtune.predictions import Predicted, Predictions

TESTED = ("val", "test", "external", "external_matched")
SENSITIVITY = "sensitivity=0.95"
NEVER = math.nextafter(1, 2)
"""A threshold that no probability reaches; JSON has no infinity."""


def rule_of(text: str | None, classes: int) -> Rule:
    """The threshold's rule; `SENSITIVITY`, or of more than two classes argmax, where none is named. Raises ConfigError."""
    rule = Rule.parse(text or (SENSITIVITY if classes == 2 else "argmax"))
    if classes > 2 and rule.kind != "argmax":
        raise ConfigError(
            f"--threshold {rule} needs two classes, these data have {classes}: of more, the most probable is decided; "
            "leave --threshold out"
        )
    return rule


def decision(found: Predictions, rule: Rule, leaked: Sequence[int] | None) -> dict[str, Any]:
    """`temperature`, `threshold` and `figures` of a run, from its logits; see `medtune.choose.build.choice`.

    The threshold is one on the calibrated probability of the positive class; None for more than two classes.
    `leaked`: external images, by index, without which the external figures are given as well.
    """
    val = found["val"]
    temperature = fit_temperature(val.logits, val.labels)
    threshold = None
    if val.logits.shape[1] == 2:
        set_on_val = choose_threshold(rule, calibrated(val.logits, temperature), val.labels).to_dict()
        value = min(set_on_val["value"], NEVER)
        threshold = {**set_on_val, "value": value, "set_on": "val", "of": "calibrated probability of class 1"}
    at = threshold["value"] if threshold else None
    figures = {split: figures_of(found[split], temperature, at) for split in TESTED}
    if leaked:
        for split in ("external", "external_matched"):
            kept = np.setdiff1d(np.arange(len(found[split].labels)), leaked)
            part = Predicted(found[split].logits[kept], found[split].labels[kept])
            figures[split]["without_leaked"] = figures_of(part, temperature, at) if len(kept) else None
    return {"temperature": temperature, "threshold": threshold, "figures": figures}


def figures_of(split: Predicted, temperature: float, at: float | None) -> dict[str, Any]:
    """A split's figures with 95 % intervals: decided by the most probable class and at the threshold; ECE and Brier score
    before and after calibration."""
    raw, cooled = metrics.softmax(split.logits), calibrated(split.logits, temperature)
    return {
        "n": len(split.labels),
        "argmax": _plain(classified(raw, split.labels)),  # as cooled, but for what rounding makes equal
        "at_threshold": None if at is None else _plain(classified(cooled, split.labels, at)),
        "before": _plain(calibration_figures(raw, split.labels)),
        "after": _plain(calibration_figures(cooled, split.labels)),
    }


def _plain(found: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {name: interval._asdict() for name, interval in found.items()}
