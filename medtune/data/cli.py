"""`medtune data get | check | where`."""

from __future__ import annotations

from pathlib import Path


def get(*, pair: str = "pneumoniamnist-cpn", native_size: int = 28, data_dir: Path | None = None) -> None:
    """Download a pair's files into the data folder; files that are there and right are left alone."""


def check(
    *,
    pair: str = "pneumoniamnist-cpn",
    native_size: int = 28,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
) -> bool:
    """Verify a pair's files and print a table; False when something is missing or wrong."""
    return True


def where(*, data_dir: Path | None = None, external_dir: Path | None = None) -> None:
    """Print where data are looked for, in order, and what was found there."""
