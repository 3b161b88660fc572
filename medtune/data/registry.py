"""The data pairs: one file each in `medtune/data/pairs/`, named as the pair with `_` for `-`.

A file with a function `names()` offers several instead: `named(name)` gives one, `refusal(name)` says why a name that
looks like one of them is none (or None).
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

from medtune.data import pairs
from medtune.data.pair import Finding, PairData, Place
from medtune.errors import DataError, unknown

Urls = Mapping[str, Sequence[str]]
"""Addresses by file name, in place of the published ones: mirrors, and tests."""

NATIVE_SIZES = (28, 64, 128, 224)


class Pair(Protocol):
    """What a module in `medtune/data/pairs/` must offer."""

    def load(
        self, *, native_size: int, data_dir: Path | None, external_dir: Path | None, external_fallback: bool
    ) -> PairData:
        """The pair's images; see `load_pair`."""

    def get(self, *, native_size: int, data_dir: Path | None, urls: Urls | None) -> Iterator[str]:
        """Download what is missing and verify it; yields what was done. Raises DataError when all is tried."""

    def check(self, *, native_size: int, data_dir: Path | None, external_dir: Path | None) -> list[Finding]:
        """Verify every file in full, without caches."""

    def where(self, *, data_dir: Path | None, external_dir: Path | None) -> list[Place]:
        """The places that are looked at, in order."""


def available_pairs() -> tuple[str, ...]:
    """Names of the pairs, sorted; imports only the modules that offer several."""
    names: list[str] = []
    for module in _modules():
        names += _family(module).names() if _is_family(module) else [module.replace("_", "-")]
    return tuple(sorted(names))


def pair(name: str) -> Pair:
    """What a pair's module offers. Raises DataError for an unknown name."""
    if name not in available_pairs():
        raise DataError(why_not(name))
    for family in map(_family, filter(_is_family, _modules())):
        if name in family.names():
            return cast(Pair, family.named(name))
    return cast(Pair, importlib.import_module(f"{pairs.__name__}.{name.replace('-', '_')}"))


def why_not(name: str) -> str:
    """The message for a name that is no pair: the reason where there is one, else the nearest names."""
    refusals = (_family(module).refusal(name) for module in _modules() if _is_family(module))
    return next((f"pair {name!r}: {reason}" for reason in refusals if reason), unknown("pair", name, available_pairs()))


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(pairs.__path__)]


@cache
def _is_family(module: str) -> bool:
    """Whether a module offers several pairs, by its text: importing all of them would load what they read files with."""
    spec = importlib.util.find_spec(f"{pairs.__name__}.{module}")
    return bool(spec and spec.origin and "\ndef names(" in Path(spec.origin).read_text(encoding="utf-8"))


def _family(module: str) -> Any:
    return importlib.import_module(f"{pairs.__name__}.{module}")


def load_pair(
    name: str,
    *,
    native_size: int = 28,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
    external_fallback: bool = False,
) -> PairData:
    """The images of a pair, checked. No network; sub-second once decoded arrays are cached.

    `native_size` is the side in px of the training set's files. `external_fallback` tests on the training set's own
    test split, under that name, where the external set is missing. Raises DataError that names what is missing or
    broken, what was expected, and the command that gets it.
    """
    if native_size not in NATIVE_SIZES:
        raise DataError(f"native_size must be one of {', '.join(map(str, NATIVE_SIZES))}, got {native_size}")
    return pair(name).load(
        native_size=native_size, data_dir=data_dir, external_dir=external_dir, external_fallback=external_fallback
    )
