"""The search space: which settings of a trial the study varies, and how Optuna sees them.

A dimension bears the name of a `TrialConfig` field and turns Optuna's parameters into that field's value. To add a
dimension, add a line to a script's space; a new kind of dimension is a class here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from medtune.config import TrialConfig
from medtune.errors import ConfigError, unknown

Condition = tuple[str, Any]
"""The name of another setting, and the value, or the tuple of values, that it must have."""


@dataclass(frozen=True, kw_only=True)
class Dimension(ABC):
    """One searched setting.

    `only_if=("optimizer", "sgd")` makes it one of that choice alone, `only_if=("model", ("a", "b"))` of either.
    """

    only_if: Condition | None = None

    @abstractmethod
    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        """Optuna's parameters behind the setting `name`."""

    @abstractmethod
    def decode(self, name: str, params: Mapping[str, Any]) -> Any:
        """The setting's value, from Optuna's parameters; the settings chosen before it are among them, by their names."""

    @abstractmethod
    def extremes(self, name: str) -> list[Any]:
        """Values that are valid only if all are."""

    @abstractmethod
    def encode(self, name: str, value: Any) -> dict[str, Any]:
        """Optuna's parameters for a given value: the inverse of `decode`."""


@dataclass(frozen=True, kw_only=True)
class Choice(Dimension):
    """One of a few values without order. Optuna sees a tuple as its JSON text: it keeps none but plain values."""

    options: tuple[Any, ...]

    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution([_plain(option) for option in self.options])}

    def decode(self, name: str, params: Mapping[str, Any]) -> Any:
        return next(option for option in self.options if _plain(option) == params[name])

    def extremes(self, name: str) -> list[Any]:
        return list(self.options)

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        return {name: _plain(value)}


MANY = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Listed(Dimension):
    """One of values to which more may be added at the end. Optuna, whose choices are fixed, sees a value's place."""

    options: tuple[Any, ...] = field(repr=False)  # not part of what the space is

    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        return {name: IntDistribution(0, MANY)}

    def decode(self, name: str, params: Mapping[str, Any]) -> Any:
        return self.options[int(params[name])]

    def extremes(self, name: str) -> list[Any]:
        return list(self.options)

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        return {name: self.options.index(_hashable(value))}


@dataclass(frozen=True, kw_only=True)
class Following(Dimension):
    """A setting that another one decides, such as the batch size by the model; Optuna is asked nothing."""

    by: str
    values: Mapping[Any, Any]
    """The setting's value for each value of the setting `by`."""

    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        return {}

    def decode(self, name: str, params: Mapping[str, Any]) -> Any:
        """Raises ConfigError for a value of the other setting that it has no value for."""
        leader = params[self.by]
        if leader not in self.values:
            known = ", ".join(map(str, self.values))
            raise ConfigError(f"{name} follows {self.by}, and has no value for {self.by} {leader!r}: it knows {known}")
        return self.values[leader]

    def extremes(self, name: str) -> list[Any]:
        return list(self.values.values())

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Whole(Dimension):
    """A whole number between two bounds."""

    low: int
    high: int

    def distributions(self, name: str) -> dict[str, BaseDistribution]:
        return {name: IntDistribution(self.low, self.high)}

    def decode(self, name: str, params: Mapping[str, Any]) -> int:
        return int(params[name])

    def extremes(self, name: str) -> list[Any]:
        return [self.low, self.high]

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        return {name: int(value)}


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
        """Raises ConfigError for a name that is no trial setting, or one that hangs on a later or unknown dimension."""
        known = TrialConfig().to_dict()
        seen: list[str] = []
        for name, dimension in dimensions.items():
            if name not in known:
                raise ConfigError(unknown("dimension", name, known))
            for other in _leaders(dimension):
                if other not in seen:
                    raise ConfigError(f"dimension {name!r} depends on {other!r}, which must come before it")
            seen.append(name)
        self.dimensions = dimensions

    @classmethod
    def of(cls, plan: Sequence[Mapping[str, Any]], kind: type[Choice | Listed] = Choice) -> SearchSpace:
        """The space that holds a plan's settings, each of which names the same ones: what is searched is nothing.

        The seed is a number without bounds, so that a plan can grow by seeds and stay of this space; a plan of `Listed`
        settings can also grow by settings.
        """
        names = list(plan[0])
        values = {name: tuple(dict.fromkeys(_hashable(settings[name]) for settings in plan)) for name in names}
        seed = Whole(low=0, high=MANY)
        return cls(**{name: seed if name == "seed" else kind(options=values[name]) for name in names})

    def suggest(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        """Ask Optuna for each dimension that applies; returns the settings to override."""
        chosen: dict[str, Any] = {}
        for name, dimension in self._applying(chosen):
            params = {key: _ask(trial, key, dist) for key, dist in dimension.distributions(name).items()}
            chosen[name] = dimension.decode(name, chosen | params)
        return chosen

    def encode(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's parameters for settings given by hand (the report's); settings that are not searched are ignored.

        A searched setting that is not given is left to the searcher. Raises ConfigError for a value outside its range,
        or one that is not what it follows from.
        """
        params: dict[str, Any] = {}
        for name, dimension in self._applying(settings):
            if name not in settings:
                continue
            if isinstance(dimension, Following):
                leads = dimension.by in settings
                if not leads or dimension.decode(name, settings) != settings[name]:
                    raise ConfigError(
                        f"settings to try first have {name} = {settings[name]!r}, but it follows {dimension.by}: "
                        + (f"{dimension.decode(name, settings)!r} for {settings[dimension.by]!r}" if leads else "give that")
                    )
            for key, value in dimension.encode(name, settings[name]).items():
                dist = dimension.distributions(name)[key]
                inside = value in dist.choices if isinstance(dist, CategoricalDistribution) else _in_range(dist, value)
                if not inside:
                    raise ConfigError(f"settings to try first have {key} = {value!r}, outside the space: {dist}")
                params[key] = value
        return params

    def completed(self, settings: Mapping[str, Any], base: TrialConfig) -> dict[str, Any]:
        """Settings to try first, with `base`'s value for each searched one that they do not name: a setting that nobody
        named is not to be drawn at random. One whose value lies outside its range is left to the searcher (`unnamed`).
        """
        whole = dict(settings)
        for name in self.unnamed(whole):
            with contextlib.suppress(ConfigError):
                self.encode({**whole, name: getattr(base, name)})
                whole[name] = getattr(base, name)
        return whole

    def unnamed(self, settings: Mapping[str, Any]) -> Iterable[str]:
        """Searched settings that would be the searcher's to choose beside these."""
        for name, dimension in self._applying(settings):
            if name not in settings and not isinstance(dimension, Following):
                yield name

    def _applying(self, settings: Mapping[str, Any]) -> Iterable[tuple[str, Dimension]]:
        for name, dimension in self.dimensions.items():
            if dimension.only_if is None or settings.get(dimension.only_if[0]) in _values(dimension.only_if):
                yield name, dimension

    def without(self, names: Iterable[str], base: TrialConfig) -> tuple[SearchSpace, TrialConfig]:
        """The space with some settings fixed at `base`'s values, and `base` with those set that follow them.

        Raises ConfigError for a setting that follows a fixed one and has no value for it.
        """
        fixed = set(names)
        left: dict[str, Dimension] = {}
        for name, dimension in self.dimensions.items():
            if name in fixed:
                continue
            condition = dimension.only_if
            if condition and condition[0] in fixed:
                if getattr(base, condition[0]) not in _values(condition):
                    fixed.add(name)
                    continue
                dimension = replace(dimension, only_if=None)
            if isinstance(dimension, Following) and dimension.by in fixed:
                value = dimension.decode(name, {dimension.by: getattr(base, dimension.by)})
                if dimension.only_if is None:
                    base = base.replace(**{name: value})
                    fixed.add(name)
                    continue
                dimension = Choice(options=(value,), only_if=dimension.only_if)
            left[name] = dimension
        return SearchSpace(**left), base

    def following(self) -> list[str]:
        """The settings that others decide."""
        return [name for name, dimension in self.dimensions.items() if isinstance(dimension, Following)]

    def values(self, name: str, base: TrialConfig) -> list[Any]:
        """What a setting can be: `base`'s value alone where it is not searched, its bounds where it is a range."""
        return self.dimensions[name].extremes(name) if name in self.dimensions else [getattr(base, name)]

    def check(self, base: TrialConfig) -> None:
        """Raises ConfigError if some value of some dimension would make no valid trial: now, not in mid-study."""
        for name, dimension in self.dimensions.items():
            for value, where in itertools.product(dimension.extremes(name), self._where(name)):
                base.replace(**where, **{name: value})
            if isinstance(dimension, Following):
                for leader in self.values(dimension.by, base):
                    dimension.decode(name, {dimension.by: leader})

    def _where(self, name: str) -> list[dict[str, Any]]:
        """The settings under which a dimension applies."""
        condition = self.dimensions[name].only_if
        if condition is None:
            return [{}]
        return [{**where, condition[0]: value} for where in self._where(condition[0]) for value in _values(condition)]

    def describe(self) -> dict[str, str]:
        """One line a dimension, for the study's record and for comparing spaces."""
        return {name: repr(dimension) for name, dimension in self.dimensions.items()}


def _values(condition: Condition) -> tuple[Any, ...]:
    return condition[1] if isinstance(condition[1], tuple) else (condition[1],)


def _leaders(dimension: Dimension) -> list[str]:
    """The settings that a dimension hangs on."""
    condition = [dimension.only_if[0]] if dimension.only_if else []
    return [*condition, *([dimension.by] if isinstance(dimension, Following) else [])]


def _plain(value: Any) -> Any:
    return json.dumps(list(value)) if isinstance(value, list | tuple) else value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
