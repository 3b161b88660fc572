"""The report's tables with this study's trials at its settings beside them, as `medtune compare` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from medtune.compare import ComparedTable, compare, text_rows
from medtune.compare.match import SECTIONS, matches_any
from medtune.report.parts import Block, Section, Table, Words
from medtune.report.source import Source
from medtune.results import trial_config
from medtune.search.ledger import Row

ALWAYS = ("4", "5")
"""Validation and external test: shown even where nothing of ours stands beside them."""


def beside(source: Source) -> Section:
    """The tables in which ours has a figure; else those of `ALWAYS`."""
    rows = [row for row in source.study.rows if _at_a_setting(source, row)]
    # The others have no place in the tables, and reading ten thousand records would take its time.
    found = compare(replace(source.study, rows=rows))
    run = [table for table in found.tables if any(s.complete for entry in table.entries for s in entry.sections)]
    tables = run or [table for table in found.tables if table.name in ALWAYS]
    blocks: list[Block] = [
        *(Words(text, "loud") for text in found.loud),
        *(Words(text, "soft") for text in found.quiet),
        *(_table(table, bool(run)) for table in tables),
        Words(f"`medtune compare {source.study.name}` has all tables, and a CSV.", "soft"),
    ]
    return Section("beside", "Beside the report's figures", blocks)


def _at_a_setting(source: Source, row: Row) -> bool:
    config = trial_config(source.study, row)
    return any(matches_any(config, schedule) for schedule in SECTIONS)


def _table(table: ComparedTable, ours: bool) -> Table:
    rows: list[Sequence[str]] = []
    strong = set()
    for entry in table.entries:
        (label, _), report, *more = text_rows(entry, list(table.heads))
        strong.add(len(rows))
        rows.append([f"{label}: the report", *report[1]])
        rows += [[words.strip(), *cells] for words, cells in more if cells]
    about = f" Ours: {table.about}." if ours else " No trial of this study stands beside it."
    return Table(table.title + "." + about, ["", *table.heads.values()], rows, strong=frozenset(strong))
