"""What failed and why, and all trials in a table."""

from __future__ import annotations

from collections import defaultdict

from medtune.progress import brief, duration, seconds_of, some
from medtune.report.answer import leaks
from medtune.report.parts import Block, Section, Table, Words
from medtune.report.source import Source
from medtune.results import metric
from medtune.search.ledger import Row

MOST = 1000
"""Rows of the table at most."""


def failures(source: Source) -> Section:
    """Trials that failed by cause, and those that were started again."""
    causes: dict[str, list[int]] = defaultdict(list)
    for row in source.study.rows:
        if row.state == "FAIL":
            causes[row.cause or "cause unknown"].append(row.number)
    ordered = sorted(causes.items(), key=lambda item: -len(item[1]))
    rows = [[some(len(numbers), "trial"), cause, _few(numbers)] for cause, numbers in ordered]
    blocks: list[Block] = [Words("No trial failed.")]
    if rows:
        blocks = [Table("Failed trials by cause.", ["failed", "cause", "which"], rows)]
    restarted = [row for row in source.study.rows if row.faults or row.errors]
    if restarted:
        again = [[f"trial {row.number}", str(row.faults), "; ".join(row.errors.values())] for row in restarted[:MOST]]
        told = f" The first {MOST} of {len(restarted)}." if len(restarted) > MOST else ""
        caption = f"Trials that were started again from their last checkpoint.{told}"
        blocks.append(Table(caption, ["started again", "times its process or machine died", "errors of its own"], again))
    return Section("failures", "Failures", blocks)


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")


def trials(source: Source) -> Section:
    """The table of all trials, the best first; bounded."""
    best = source.complete
    place = {row.number: i for i, row in enumerate(best)}
    ordered = sorted(source.study.rows, key=lambda row: (place.get(row.number, len(place)), row.number))
    heads = ["trial", "state", "epochs", source.selection, "ext. AUC", "ext. OA", "time", "settings or cause"]
    command = f"`medtune trials {source.study.name}` lists all"
    told = f" The first {MOST} of {len(ordered)}; {command}." if len(ordered) > MOST else ""
    table = Table(
        f"The best by {source.selection} first, then those not trained to the end; a click on a head sorts. Ext.: "
        f"{source.external_name}, images as they are.{told}",
        heads, [_row(source, row) for row in ordered[:MOST]], sortable=True,
    )  # fmt: skip
    blocks: list[Block] = [*leaks(source), table] if ordered else [Words("No trial yet.")]
    return Section("trials", "All trials", blocks)


def _row(source: Source, row: Row) -> list[str]:
    figures = (row.value, *(metric(row, f"{source.external}/{name}") for name in ("auc", "oa")))
    return [
        str(row.number),
        source.study.state(row),
        f"{row.epoch}/{source.epochs(row)}",
        *("-" if value is None else f"{value:.4f}" for value in figures),
        duration(seconds_of(row)),
        row.cause or brief(row.settings or {}),
    ]
