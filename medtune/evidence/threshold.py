"""From which probability on an image is called positive: set by a rule on one set, then held on every other.

Two classes only. An image is positive when its probability of class 1 is at least the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtune.errors import ConfigError
from medtune.metrics import Array, checked, classification

NAMES = ("oa", "sensitivity", "specificity", "f1")
"""The figures that a threshold decides."""

ARGMAX = math.nextafter(0.5, 1)
"""The more probable class: a tie is negative, as it is for argmax."""

_FORMS = "sensitivity=0.95 (or another share), youden, costs=5:1 (a missed positive to a false alarm), argmax"


@dataclass(frozen=True)
class Rule:
    """How a threshold is set."""

    kind: Literal["sensitivity", "youden", "costs", "argmax"]
    sensitivity: float = math.nan
    """The share of positives that must be found, in (0, 1]."""
    costs: tuple[float, float] = (1.0, 1.0)
    """Of a missed positive and of a false alarm; only their ratio counts."""

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`sensitivity=0.95`, `youden`, `costs=5:1` or `argmax`. Raises ConfigError for anything else."""
        kind, _, value = text.strip().partition("=")
        try:
            if kind == "sensitivity" and 0 < float(value) <= 1:
                return cls("sensitivity", sensitivity=float(value))
            if kind == "costs":
                missed, alarm = map(float, value.split(":"))
                if min(missed, alarm) > 0 and math.isfinite(missed + alarm):
                    return cls("costs", costs=(missed, alarm))
        except ValueError:
            pass
        if text.strip() == "youden":
            return cls("youden")
        if text.strip() == "argmax":
            return cls("argmax")
        raise ConfigError(f"threshold rule must be one of {_FORMS}; got {text!r}")

    def __str__(self) -> str:
        if self.kind == "sensitivity":
            return f"sensitivity={self.sensitivity:g}"
        return "costs={:g}:{:g}".format(*self.costs) if self.kind == "costs" else self.kind


@dataclass(frozen=True)
class Threshold:
    """A threshold, the rule that set it, and what it does on the set that it was set on."""

    rule: Rule
    value: float
    figures: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `rule` as it is typed, `value`, `figures`."""
        return {"rule": str(self.rule), "value": self.value, "figures": dict(self.figures)}


def choose_threshold(rule: Rule, probs: ArrayLike, labels: ArrayLike) -> Threshold:
    """The threshold that a rule sets on probs (N, 2) and labels (N,).

    sensitivity: the largest one that reaches it. youden: the highest sensitivity + specificity. costs: the lowest cost
    at the set's own share of positives. Of several as good the smallest, which finds most positives. All but argmax
    are looked for among the probabilities that occur; costs may also call no image positive (infinity).
    Raises ConfigError for more than two classes, and where a class that the rule needs is missing.
    """
    values, truth = _two(probs, labels)
    value = ARGMAX if rule.kind == "argmax" else _searched(rule, values[:, 1], truth == 1)
    return Threshold(rule, value, at_threshold(values, truth, value))


def at_threshold(probs: ArrayLike, labels: ArrayLike, threshold: float) -> dict[str, float | None]:
    """`NAMES` of probs (N, 2) at a threshold; None where undefined. Raises ConfigError for more than two classes."""
    found = classification(decided(probs, labels, threshold), labels)
    return {name: found[name] for name in NAMES}


def decided(probs: ArrayLike, labels: ArrayLike, threshold: float) -> Array:
    """Decisions (N, 2), one 1 a row, as `medtune.metrics` takes probabilities."""
    values, _ = _two(probs, labels)
    return np.eye(2)[(values[:, 1] >= threshold).astype(int)]


def _searched(rule: Rule, scores: Array, positive: NDArray[np.bool_]) -> float:
    for kind in (True,) if rule.kind == "sensitivity" else (True, False):
        if not (positive == kind).any():
            missing = "positive" if kind else "negative"
            raise ConfigError(f"threshold rule {rule}: there is no {missing} image to set it on; argmax needs none")
    candidates = np.unique(scores)  # rising: the first of the best is the smallest
    found = _at_least(scores[positive], candidates)
    alarms = _at_least(scores[~positive], candidates)
    if rule.kind == "sensitivity":
        # A share that is meant to be reached is not missed by a rounding error of its product.
        enough = math.ceil(rule.sensitivity * found[0] - 1e-9)
        return float(candidates[np.flatnonzero(found >= enough)[-1]])
    if rule.kind == "youden":
        # In whole numbers: equal ones must compare as equal.
        return float(candidates[np.argmax(found * alarms[0] - alarms * found[0])])
    missed, alarm = rule.costs
    costs = np.append(missed * (found[0] - found) + alarm * alarms, missed * found[0])
    return float(np.append(candidates, math.inf)[np.argmin(costs)])


def _at_least(scores: Array, candidates: Array) -> NDArray[np.int64]:
    """How many scores are at least each candidate."""
    return len(scores) - np.searchsorted(np.sort(scores), candidates, side="left")


def _two(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    values, truth = checked(probs, labels)
    if values.shape[1] != 2:
        raise ConfigError(
            f"a decision threshold needs two classes, these probabilities are of {values.shape[1]}: "
            "of more, the most probable class is decided"
        )
    return values, truth
