"""Whether what is good on val is good elsewhere: external figures against val figures, of all trials."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from medtune.choose.hindsight import ENOUGH, METRICS, RUNS, USES, correlations
from medtune.progress import brief
from medtune.report.answer import leaks
from medtune.report.parts import COLOURS, GREY, MARKS, Block, Plot, Section, Table, Words, axis, points, spread
from medtune.report.source import Source
from medtune.results import GROUPS, metric, trial_config
from medtune.search.ledger import Row

MOST = 2000
"""Trials drawn at most."""
UNSEEN = (
    "External labels are shown here to judge the selection metric for the next study; no choice of this study rests on them."
)
SEEN = "The choice of this study has seen the external labels: these figures cannot stand as the test of it."


def transfer(source: Source) -> Section:
    """The section; in words alone while no trial was tested."""
    title = "Val against the external set"
    selection, external = source.selection, f"{source.external}/auc"
    rows = [row for row in source.study.rows if None not in source.numbers((row,), selection, external)[0]]
    if not rows:
        return Section("transfer", title, [Words("No trial has both a val figure and an external AUC yet.")])
    blocks: list[Block] = [*leaks(source), _plot(source, rows, selection, external), *_correlations(source)]
    return Section("transfer", title, blocks)


def _plot(source: Source, rows: Sequence[Row], selection: str, external: str) -> Plot:
    drawn = spread(rows, MOST)
    complete = [row for row in rows if row.state == "COMPLETE"]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in drawn:
        groups[trial_config(source.study, row).model, source.study.state(row)].append(row)
    models = list(dict.fromkeys(model for model, _ in sorted(groups)))
    traces = [_marks(those, selection, external, key, models) for key, those in sorted(groups.items())]
    sampled = f" {len(drawn)} of {len(rows)} trials are drawn." if len(drawn) < len(rows) else ""
    return Plot(
        "transfer-plot", f"External AUC against {selection}",
        f"Each mark is a trial, {len(complete)} of {len(rows)} trained to the end; the colour tells the model, a full "
        f"circle one trained to the end, other marks one that was not.{sampled}",
        SEEN if (source.choice or {}).get("external_labels_used") else UNSEEN,
        traces,
        {"xaxis": axis(selection), "yaxis": axis("external AUC")},
    )  # fmt: skip


def _marks(
    rows: Sequence[Row], selection: str, external: str, key: tuple[str, str], models: Sequence[str]
) -> dict[str, Any]:
    model, state = key
    place = models.index(model)
    colour = COLOURS[place] if place < len(COLOURS) else GREY
    x = [metric(row, selection) for row in rows]
    y = [metric(row, external) for row in rows]
    told = [f"trial {row.number}, {state}<br>{brief(row.settings or {})}" for row in rows]
    hover = "%{text}<br>%{x:.4f}, %{y:.4f}<extra></extra>"
    return points(x, y, f"{model}, {state}", colour, MARKS[state], text=told, hovertemplate=hover)


def _correlations(source: Source) -> list[Table | Words]:
    """Of each selection metric with the external figures: over the study's trials, and over the finalists' runs."""
    complete = source.complete
    names = list(dict.fromkeys((source.selection, *METRICS)))
    externals = [f"{source.external}{matched}/{name}" for matched in ("", "_matched") for name in ("auc", "oa")]
    heads = ["selected by", *(f"{GROUPS[name.split('/')[0]]}: {name.split('/')[1].upper()}" for name in externals)]
    tables: list[Table | Words] = []
    if len(complete) >= 3:
        found = [correlations(complete, "the study's trials", external, names) for external in externals]
        rows = [[name, *map(_cell, cells)] for name, *cells in zip(names, *found, strict=True)]
        tables.append(Table(_caption(f"{len(complete)} trials trained to the end"), heads, rows))
    else:
        tables.append(Words(f"A rank correlation takes three trials trained to the end; there are {len(complete)}."))
    runs = [one for one in (source.choice or {}).get("correlations", ()) if one["over"] == RUNS]
    if runs:
        rows = [[one["selection"], _cell(one)] for one in runs]
        tables.append(Table(_caption(f"{RUNS}, by `medtune choose`"), ["selected by", heads[1]], rows))
    return tables


def _caption(over: str) -> str:
    return (
        f"Rank correlation (Spearman) over {over}, with 95 % intervals (Bonett and Wright): 1 where the better on val is "
        f"always the better there; losses are turned round. This {USES}."
    )


def _cell(one: Mapping[str, Any]) -> str:
    if one["rho"] is None:
        return "-"
    few = f" (too few: {one['n']})" if one["n"] < ENOUGH else ""
    return f"{one['rho']:+.2f}" + (f" [{one['low']:+.2f}, {one['high']:+.2f}]" if one["low"] is not None else "") + few
