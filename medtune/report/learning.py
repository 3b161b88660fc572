"""How trials learned: the selection metric over the epochs, with the rungs at which the poor ones were stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medtune.curves import rung_epochs
from medtune.progress import brief
from medtune.report.parts import COLOURS, DASHES, GREY, Plot, Section, Words, axis, line, points, spread
from medtune.report.source import Source
from medtune.results import epochs, trial_config
from medtune.search.ledger import Row

Curve = Sequence[tuple[int, float]]
"""Epochs and values."""
MOST = 60
"""Trials drawn at most: the record of each is read from its own file."""
NAMED = 4
"""The best trials, which have a colour and a dash of their own."""


def learning(source: Source) -> Section:
    """The section; in words alone while no trial has finished an epoch."""
    begun = [row for row in source.study.rows if row.epoch]
    best = source.complete[: MOST // 3]
    inside = {row.number for row in best}
    chosen = [*best, *spread([row for row in begun if row.number not in inside], MOST - len(best))]
    curves = {row.number: found for row in chosen if (found := _curve(source, row))}
    drawn = [row for row in chosen if row.number in curves]
    blocks = [_plot(source, drawn, curves, len(begun))] if drawn else [Words("No trial has finished an epoch yet.")]
    return Section("learning", "How trials learned", blocks)


def _curve(source: Source, row: Row) -> Curve:
    lines = ((line["epoch"], line.get("metrics", {}).get(source.selection)) for line in epochs(source.study, row))
    return [(epoch, float(value)) for epoch, value in lines if value is not None and math.isfinite(value)]


def _plot(source: Source, rows: Sequence[Row], curves: Mapping[int, Curve], begun: int) -> Plot:
    same = len({source.epochs(row) for row in rows}) == 1
    named = rows[: min(NAMED, len(source.complete))]
    others = rows[len(named) :]
    trained = [row for row in others if row.state == "COMPLETE"]
    rest = [row for row in others if row.state != "COMPLETE"]
    traces = [_others(source, trained, curves, same, "trained to the end", "solid")]
    traces += [_others(source, rest, curves, same, "stopped early or unfinished", "dot"), _ends(source, rest, curves, same)]
    for place, row in enumerate(named):
        x, y = _steps(source, row, curves[row.number], same)
        told = _told(source, row, y)
        traces.append(line(x, y, f"trial {row.number}", COLOURS[place], DASHES[place], text=told, hoverinfo="text"))
    values = [value for row in rows for _, value in curves[row.number]]
    log = source.minimise and min(values) > 0 and max(values) / min(values) > 20
    rungs = _rungs(source, rows[0], same)
    drawn = f" {len(rows)} of {begun} trials are drawn: the best and an even choice." if len(rows) < begun else ""
    return Plot(
        "learning-curves", "Learning curves",
        f"{source.selection} of every epoch; the best {len(named)} by name, the others grey, a cross where a trial was "
        f"stopped or failed{'; dotted uprights are rungs, where poor trials end' if rungs else ''}.{drawn}",
        "The choice rests on each trial's best epoch, so a curve that rises again at its end costs nothing.",
        [trace for trace in traces if trace["x"]],
        {
            "xaxis": axis("epoch" if same else "share of the trial's own epochs", rangemode="tozero"),
            "yaxis": axis(source.selection + (", logarithmic" if log else ""), type="log" if log else "linear"),
            "shapes": [_upright(at) for at in rungs],
        },
    )  # fmt: skip


def _steps(
    source: Source, row: Row, curve: Curve, same: bool
) -> tuple[list[float | None], list[float | None]]:
    of = 1 if same else source.epochs(row)
    return [epoch / of for epoch, _ in curve], [value for _, value in curve]


def _others(
    source: Source, rows: Sequence[Row], curves: Mapping[int, Curve], same: bool, name: str, dash: str
) -> dict[str, Any]:
    """One trace for many trials: their lines are parted by gaps."""
    x: list[float | None] = []
    y: list[float | None] = []
    told: list[str | None] = []
    for row in rows:
        some_x, some_y = _steps(source, row, curves[row.number], same)
        x, y, told = [*x, *some_x, None], [*y, *some_y, None], [*told, *_told(source, row, some_y), None]
    return line(x, y, name, GREY, dash, thick=1.3, opacity=0.8, text=told, hoverinfo="text")


def _ends(source: Source, rows: Sequence[Row], curves: Mapping[int, Curve], same: bool) -> dict[str, Any]:
    ended = [row for row in rows if row.state in ("PRUNED", "FAIL")]
    last = [_steps(source, row, curves[row.number][-1:], same) for row in ended]
    told = [f"trial {row.number}: {row.state} after epoch {row.epoch}" for row in ended]
    x, y = [x[0] for x, _ in last], [y[0] for _, y in last]
    return points(x, y, "stopped or failed", GREY, "x-thin-open", text=told, hoverinfo="text")


def _told(source: Source, row: Row, y: Sequence[float | None]) -> list[str | None]:
    head = f"trial {row.number}, {source.study.state(row)}"
    return [f"{head}: {value:.4f}<br>{brief(row.settings or {})}" for value in y]


def _rungs(source: Source, row: Row, same: bool) -> list[float]:
    """Trials of other epochs have theirs at the same shares, but for rounding."""
    config = trial_config(source.study, row)
    return [epoch / (1 if same else config.epochs) for epoch in rung_epochs(source.study, config)]


def _upright(at: float) -> dict[str, Any]:
    style = {"color": GREY, "dash": "dot", "width": 1.5}
    return {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": style}
