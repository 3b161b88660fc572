"""A study's search space in W&B's words, under the names that its runs have in their configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medtune.search.space import Choice, Dimension, Following, Listed, Milestones, Real, SearchSpace, Whole

Parameters = dict[str, dict[str, Any]]


def parameters(space: SearchSpace) -> Parameters:
    """The `parameters` of a sweep's configuration. W&B knows no conditions: all stand side by side."""
    found: Parameters = {}
    for name, dimension in space.dimensions.items():
        found |= _words(name, dimension)
    return found


def planned(settings: Sequence[Mapping[str, Any]]) -> Parameters:
    """The same of a plan: the values that occur in it."""
    names = dict.fromkeys(name for one in settings for name in one)
    return {name: {"values": _distinct([one[name] for one in settings if name in one])} for name in names}


def _words(name: str, dimension: Dimension) -> Parameters:
    match dimension:
        case Choice() | Listed():
            return {name: {"values": _distinct(dimension.options)}}
        case Following():
            return {name: {"values": _distinct(list(dimension.values.values()))}}
        case Whole():
            return {name: {"distribution": "int_uniform", "min": dimension.low, "max": dimension.high}}
        case Real():
            kind = "log_uniform_values" if dimension.log else "uniform"
            return {name: {"distribution": kind, "min": dimension.low, "max": dimension.high}}
        case Milestones():
            least, most = dimension.count
            return {
                f"{name}_first": {"distribution": "uniform", "min": dimension.first[0], "max": dimension.first[1]},
                f"{name}_gap": {"distribution": "uniform", "min": dimension.gap[0], "max": dimension.gap[1]},
                f"{name}_count": {"distribution": "int_uniform", "min": least, "max": most},
            }
    raise TypeError(f"no words of W&B's for {dimension!r}")


def _distinct(values: Sequence[Any]) -> list[Any]:
    plain = [list(value) if isinstance(value, tuple) else value for value in values]
    return [value for place, value in enumerate(plain) if value not in plain[:place]]
