"""`medtune data get | check | where`: plain functions that print; the command line is derived from their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medtune.data.registry import Urls, available_pairs
from medtune.data.registry import pair as by_name

DEFAULT_PAIR = "pneumoniamnist-cpn"
_COLOURS = {"ok": "green", "note": "yellow", "missing": "red", "broken": "red"}


def get(
    *,
    pair: str = DEFAULT_PAIR,
    native_size: int = 28,
    data_dir: Path | None = None,
    urls: Urls | None = None,
) -> None:
    """Download a pair's files into the data folder and verify them; files that are there and right are left alone.

    Raises DataError (`medtune.data.download.Unreachable` where no server answers).
    """
    for line in by_name(pair).get(native_size=native_size, data_dir=data_dir, urls=urls):
        print(line)


def check(
    *,
    pair: str = DEFAULT_PAIR,
    native_size: int = 28,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
) -> bool:
    """Read and verify a pair's files in full and print a table; False where something is missing or broken."""
    findings = by_name(pair).check(native_size=native_size, data_dir=data_dir, external_dir=external_dir)
    rows = [(f.file, f.found, f.expected, f.verdict) for f in findings]
    _table(("file", "found", "expected", "verdict"), rows)
    return all(f.verdict in ("ok", "note") for f in findings)


def where(
    *, pair: str | None = None, data_dir: Path | None = None, external_dir: Path | None = None
) -> None:
    """Print where data are looked for, in order, what is there, and which place is used."""
    for name in [pair] if pair else available_pairs():
        places = by_name(name).where(data_dir=data_dir, external_dir=external_dir)
        rows = [(p.what, p.named_by, p.path, p.found, "yes" if p.used else "") for p in places]
        _table(("what", "named by", "path", "found", "used"), rows, title=f"pair {name}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    console = Console()
    if not console.is_terminal:  # whole paths, one line a row: for logs and grep
        for row in [[title]] * bool(title) + [columns, *rows]:
            print("\t".join(map(str, row)))
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    console.print(table)

