"""A plan: settings to be trained in order, each from several seeds, without a searcher and without stopping any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medtune.config import TrialConfig
from medtune.errors import ConfigError

Settings = Mapping[str, Any]

COSTS = ("epochs", "batch_size")
"""What the command line, and a preset other than `full`, sets for every model alike."""


def plan(
    settings: Sequence[Settings],
    base: TrialConfig,
    *,
    seeds: int,
    given: Iterable[str] = (),
    without: Iterable[str] = (),
) -> tuple[dict[str, Any], ...]:
    """All of `settings` from `base`'s seed, then all from the next: a plan of more seeds begins with that of fewer.

    Each names the same settings: what one does not name has its default. `given`: settings that `base` has from the
    command line; they leave of the plan what agrees with them, but for `COSTS`, which they set. `without`: settings that
    `base` sets for all. Raises ConfigError if nothing is left, or for fewer than one seed.
    """
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    defaults = TrialConfig().to_dict()
    names = list(dict.fromkeys(name for one in settings for name in one))
    whole = [{name: one.get(name, defaults[name]) for name in names} for one in settings]
    dropped = {*without, *(name for name in given if name in COSTS)}
    left: list[dict[str, Any]] = []
    for one in whole:
        kept = {name: value for name, value in one.items() if name not in dropped}
        if all(one[name] == getattr(base, name) for name in given if name in kept) and kept not in left:
            left.append(kept)
    if not left:
        restricting = [name for name in given if name in names and name not in dropped]
        asked = ", ".join(f"{name} {getattr(base, name)!r}" for name in restricting)
        known = "; ".join(f"{name}: {_values(whole, name)}" for name in restricting)
        raise ConfigError(f"no planned settings have {asked}. Planned are {known}")
    return tuple({**one, "seed": base.seed + replicate} for replicate in range(seeds) for one in left)


def _values(settings: Sequence[Settings], name: str) -> str:
    return ", ".join(dict.fromkeys(str(one[name]) for one in settings))
