"""The data pairs: one file each in `medtune/data/pairs/`, named as the pair with `_` for `-`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

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
    """Names of the pairs, sorted; imports none of them."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(pairs.__path__)))


def pair(name: str) -> Pair:
    """The module of a pair. Raises DataError for an unknown name."""
    if name not in available_pairs():
        raise DataError(unknown("pair", name, available_pairs()))
    return cast(Pair, importlib.import_module(f"medtune.data.pairs.{name.replace('-', '_')}"))


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
