"""The search space: which settings of a trial the study varies, and how Optuna sees them.

A dimension bears the name of a `TrialConfig` field and turns Optuna's parameters into that field's value. To add a
dimension, add a line to a script's space; a new kind of dimension is a class here.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from medtune.config import TrialConfig
from medtune.errors import ConfigError, unknown

Condition = tuple[str, Any]


@dataclass(frozen=True, kw_only=True)
class Dimension(ABC):
    """One searched setting; `only_if=("optimizer", "sgd")` makes it one of that choice alone."""

    only_if: Condition | None = None

    @abstractmethod
    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        """Optuna's parameters behind the setting `name`."""

    @abstractmethod
    def decode(self, name: str, params: Mapping[str, Any]) -> Any:
        """The setting's value, from Optuna's parameters."""

    @abstractmethod
    def extremes(self, name: str) -> list[Any]:
        """Values that are valid only if all are."""

    @abstractmethod
    def encode(self, name: str, value: Any) -> dict[str, Any]:
        """Optuna's parameters for a given value: the inverse of `decode`."""


@dataclass(frozen=True, kw_only=True)
class Choice(Dimension):
    """One of a few values without order."""

    options: tuple[Any, ...]

    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(self.options)}

    def decode(self, name: str, params: Mapping[str, Any]) -> Any:
        return params[name]

    def extremes(self, name: str) -> list[Any]:
        return list(self.options)

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        return {name: value}


@dataclass(frozen=True, kw_only=True)
class Real(Dimension):
    """A number between two bounds, evenly spread over them or over their logarithms."""

    low: float
    high: float
    log: bool = False

    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        return {name: FloatDistribution(self.low, self.high, log=self.log)}

    def decode(self, name: str, params: Mapping[str, Any]) -> float:
        return float(params[name])

    def extremes(self, name: str) -> list[Any]:
        return [self.low, self.high]

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        return {name: float(value)}


@dataclass(frozen=True, kw_only=True)
class Milestones(Dimension):
    """Milestones as ordered numbers: where the first lies, the gap between them, how many (fractions of the epochs).

    Numbers, not a list of hand-made schedules: TPE can model that an early first drop is good.
    """

    first: tuple[float, float] = (0.1, 0.4)
    gap: tuple[float, float] = (0.05, 0.3)
    count: tuple[int, int] = (1, 3)

    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        return {
            f"{name}.first": FloatDistribution(*self.first),
            f"{name}.gap": FloatDistribution(*self.gap),
            f"{name}.count": IntDistribution(*self.count),
        }

    def decode(self, name: str, params: Mapping[str, Any]) -> tuple[float, ...]:
        first, gap, count = (params[f"{name}.{part}"] for part in ("first", "gap", "count"))
        return tuple(m for m in (first + i * gap for i in range(int(count))) if m < 1)

    def extremes(self, name: str) -> list[Any]:
        corners = itertools.product(self.first, self.gap, self.count)
        keys = (f"{name}.first", f"{name}.gap", f"{name}.count")
        return [self.decode(name, dict(zip(keys, corner, strict=True))) for corner in corners]

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        marks = tuple(value)
        gaps = [b - a for a, b in itertools.pairwise(marks)]
        if not marks or any(abs(gap - gaps[0]) > 1e-9 for gap in gaps):
            raise ConfigError(f"{name} must be evenly spaced to be searched as first, gap and count, got {marks}")
        gap = gaps[0] if gaps else self.gap[0]
        return {f"{name}.first": marks[0], f"{name}.gap": gap, f"{name}.count": len(marks)}


class SearchSpace:
    """Dimensions by the name of the setting they vary, in the order in which they are asked."""

    def __init__(self, **dimensions: Dimension) -> None:
        """Raises ConfigError for a name that is no trial setting, or a condition on a later or unknown dimension."""
        known = TrialConfig().to_dict()
        seen: list[str] = []
        for name, dimension in dimensions.items():
            if name not in known:
                raise ConfigError(unknown("dimension", name, known))
            if dimension.only_if and dimension.only_if[0] not in seen:
                raise ConfigError(f"dimension {name!r} depends on {dimension.only_if[0]!r}, which must come before it")
            seen.append(name)
        self.dimensions = dimensions

    def suggest(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        """Ask Optuna for each dimension that applies; returns the settings to override."""
        chosen: dict[str, Any] = {}
        for name, dimension in self._applying(chosen):
            params = {key: _ask(trial, key, dist) for key, dist in dimension.distributions(name).items()}
            chosen[name] = dimension.decode(name, params)
        return chosen

    def encode(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's parameters for settings given by hand (the report's); settings that are not searched are ignored.

        A searched setting that is not given is left to the searcher. Raises ConfigError for a value outside its range.
        """
        params: dict[str, Any] = {}
        for name, dimension in self._applying(settings):
            if name not in settings:
                continue
            for key, value in dimension.encode(name, settings[name]).items():
                dist = dimension.distributions(name)[key]
                inside = value in dist.choices if isinstance(dist, CategoricalDistribution) else _in_range(dist, value)
                if not inside:
                    raise ConfigError(f"settings to try first have {key} = {value!r}, outside the space: {dist}")
                params[key] = value
        return params

    def _applying(self, settings: Mapping[str, Any]) -> Iterable[tuple[str, Dimension]]:
        for name, dimension in self.dimensions.items():
            if dimension.only_if is None or settings.get(dimension.only_if[0]) == dimension.only_if[1]:
                yield name, dimension

    def without(self, names: Iterable[str], base: TrialConfig) -> SearchSpace:
        """The space with some settings fixed at `base`'s values; what depends on them follows."""
        fixed = set(names)
        left: dict[str, Dimension] = {}
        for name, dimension in self.dimensions.items():
            if name in fixed:
                continue
            condition = dimension.only_if
            if condition and condition[0] in fixed:
                if getattr(base, condition[0]) != condition[1]:
                    continue
                dimension = replace(dimension, only_if=None)
            left[name] = dimension
        return SearchSpace(**left)

    def check(self, base: TrialConfig) -> None:
        """Raises ConfigError if some value of some dimension would make no valid trial: now, not in mid-study."""
        for name, dimension in self.dimensions.items():
            for value in dimension.extremes(name):
                base.replace(**{name: value})

    def describe(self) -> dict[str, str]:
        """One line a dimension, for the study's record and for comparing spaces."""
        return {name: repr(dimension) for name, dimension in self.dimensions.items()}


def _ask(trial: optuna.trial.Trial, key: str, dist: BaseDistribution) -> Any:
    if isinstance(dist, CategoricalDistribution):
        return trial.suggest_categorical(key, dist.choices)
    if isinstance(dist, IntDistribution):
        return trial.suggest_int(key, dist.low, dist.high)
    assert isinstance(dist, FloatDistribution)
    return trial.suggest_float(key, dist.low, dist.high, log=dist.log)


def _in_range(dist: BaseDistribution, value: Any) -> bool:
    low, high = getattr(dist, "low", None), getattr(dist, "high", None)
    # A little slack: 1/3 + 1/6 and the like differ from the bounds in the last place.
    return low is not None and high is not None and low - 1e-9 <= value <= high + 1e-9
