"""What the settings did: parallel coordinates, and how much each matters, with how sure that is."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from medtune.progress import brief
from medtune.report.parts import BLUE, GREY, ORANGE, Plot, Section, Words, axis, line, spread
from medtune.report.source import Source
from medtune.search.ledger import Row

MOST = 400
"""Trials drawn at most."""
NONE = -0.12
"""Where a trial that has no value of a setting crosses its axis."""


def space(source: Source) -> Section:
    """Both pictures, or why there are none."""
    if source.study.record.get("planned"):
        return Section("space", "What the settings did", [Words("A plan searches nothing: its settings are in the table.")])
    blocks: list[Any] = []
    drawn = [row for row in source.study.rows if row.value is not None and math.isfinite(row.value) and row.params]
    blocks += [_parallel(source, drawn)] if drawn else [Words("No trial has a result yet.")]
    return Section("space", "What the settings did", [*blocks, importance(source)])


# --- parallel coordinates -------------------------------------------------------------------------------------------


def _parallel(source: Source, rows: Sequence[Row]) -> Plot:
    ordered = sorted(rows, key=lambda row: (row.state != "COMPLETE", row.value if source.minimise else -(row.value or 0.0)))
    best = [row for row in ordered if row.state == "COMPLETE"]
    kept = [*best[: MOST // 2], *spread(ordered[len(best[: MOST // 2]) :], MOST // 2)]
    names = list(dict.fromkeys(name for row in kept for name in row.params))
    axes = {name: _axis(source, name, kept) for name in names}
    values = np.array([row.value for row in kept], dtype=float)
    good = np.percentile(values, 90 if source.minimise else 10)
    result = _Scale.of_numbers(np.clip(values, *((None, good) if source.minimise else (good, None))), log=False)
    groups = _groups(kept, best)
    traces = [_lines(group, name, style, axes, result) for name, (group, style) in groups.items() if group]
    part = f" {len(kept)} of {len(rows)} trials are drawn: the best and an even choice of the others."
    sampled = part if len(kept) < len(rows) else ""
    return Plot(
        "parallel", "Parallel coordinates",
        f"Each line is a trial: it crosses every axis at its setting, and the last one at its {source.selection}; the "
        f"best tenth and the best are drawn thicker.{sampled}",
        "Settings were not drawn evenly: the searcher went where it had found good trials, so bundles show where it was.",
        traces,
        _parallel_layout([*axes.items(), (source.selection, result)]),
        width=round(_room([*axes.items(), (source.selection, result)]) * (len(axes) + 1)),
        height=420,
    )  # fmt: skip


class _Scale:
    """Where the values of a setting lie on its axis, from 0 to 1, and which are written there."""

    def __init__(self, places: Mapping[Any, float] | None, low: float = 0.0, high: float = 1.0, log: bool = False) -> None:
        self.places, self.low, self.high, self.log = places, low, high, log
        self.missing = False
        """Whether some trial has no value."""

    @classmethod
    def of_numbers(cls, values: Any, log: bool) -> _Scale:
        low, high = float(np.min(values)), float(np.max(values))
        return cls(None, low, high, log and low > 0)

    def place(self, value: Any) -> float:
        if value is None:
            self.missing = True
            return NONE
        if self.places is not None:
            return self.places[value]
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> Iterator[tuple[float, str]]:
        if self.places is not None:
            yield from ((place, str(value)) for value, place in self.places.items())
            return
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        for value in dict.fromkeys((self.low, middle, self.high)):
            yield self.place(value), f"{value:.3g}"


def _axis(source: Source, name: str, rows: Sequence[Row]) -> _Scale:
    found = [row.params[name] for row in rows if name in row.params]
    kind = next(t.distributions[name] for t in source.trials.values() if name in t.distributions)
    if isinstance(kind, CategoricalDistribution):
        values = [choice for choice in kind.choices if choice in found]
        return _Scale({value: i / (len(values) - 1) if len(values) > 1 else 0.5 for i, value in enumerate(values)})
    return _Scale.of_numbers(np.array(found, dtype=float), log=isinstance(kind, FloatDistribution) and kind.log)


def _groups(kept: Sequence[Row], best: Sequence[Row]) -> dict[str, tuple[list[Row], dict[str, Any]]]:
    top = {row.number for row in best[: max(1, len(best) // 10)]}
    first = best[0].number if best else None
    trained = [row for row in kept if row.state == "COMPLETE" and row.number not in top]
    return {
        "stopped early or unfinished": (
            [row for row in kept if row.state != "COMPLETE"],
            {"colour": GREY, "dash": "dot", "thick": 1, "opacity": 0.55},
        ),
        "trained to the end": (trained, {"colour": GREY, "dash": "solid", "thick": 1.2, "opacity": 0.8}),
        "best tenth": (
            [row for row in kept if row.number in top and row.number != first],
            {"colour": BLUE, "dash": "solid", "thick": 2},
        ),
        "the best": (
            [row for row in kept if row.number == first],
            {"colour": ORANGE, "dash": "solid", "thick": 3.5, "mode": "lines+markers"},
        ),
    }


def _lines(
    rows: Sequence[Row], name: str, style: dict[str, Any], axes: Mapping[str, _Scale], result: _Scale
) -> dict[str, Any]:
    """One trace for many trials: their lines are parted by gaps."""
    x: list[float | None] = []
    y: list[float | None] = []
    told: list[str | None] = []
    for row in rows:
        places = [scale.place(row.params.get(key)) for key, scale in axes.items()]
        x += [*range(len(places) + 1), None]
        y += [*places, result.place(row.value), None]
        told += [f"trial {row.number}, {row.state}, {row.value:.4f}<br>{brief(row.params)}"] * (len(places) + 1) + [None]
    return line(x, y, name, text=told, hoverinfo="text", **style)


def head_lines(name: str, most: int = 11) -> list[str]:
    """An axis's name in lines of at most so many letters where it has places to break: `milestones`, `.first`."""
    lines = [""]
    for part in re.findall(r"[._/]?[^._/]+", name):
        lines = [*lines[:-1], lines[-1] + part] if len(lines[-1] + part) <= most or not lines[-1] else [*lines, part]
    return lines


def _room(axes: Sequence[tuple[str, _Scale]]) -> float:
    """Px from one axis to the next, so that neither heads (bold, in the middle) nor values (to the right) touch."""
    heads = [8.2 * len(text) + 20 for name, _ in axes for text in head_lines(name)]
    values = [6.8 * len(text) + 20 for _, scale in axes for _, text in scale.ticks()]
    return max(110, *heads, *values)


def _parallel_layout(axes: Sequence[tuple[str, _Scale]]) -> dict[str, Any]:
    notes = []
    for place, (name, scale) in enumerate(axes):
        head = f"<b>{'<br>'.join(head_lines(name))}</b>"
        notes.append({"x": place, "y": 1.04, "text": head, "showarrow": False, "yanchor": "bottom"})
        for at, text in [*scale.ticks(), *([(NONE, "none")] if scale.missing else [])]:
            notes.append({"x": place, "y": at, "text": text, "showarrow": False, "xanchor": "left", "xshift": 4})
    bar = {"type": "line", "y0": 0, "y1": 1, "line": {"color": GREY, "width": 1.5}}
    bars = [{**bar, "x0": place, "x1": place} for place in range(len(axes))]
    hidden = {"visible": False, "fixedrange": True}
    return {
        "annotations": notes, "shapes": bars,
        "xaxis": {**hidden, "range": [-0.15, len(axes) - 0.35]}, "yaxis": {**hidden, "range": [-0.2, 1.22]},
    }  # fmt: skip


# --- importance -----------------------------------------------------------------------------------------------------

FORESTS = 16
TREES = 16
DRAWN = 150
"""Trials that a forest is fitted to at most."""
ENOUGH = 15
"""Fewer trials than this trained to the end say nothing of importance."""


def importance(source: Source) -> Plot | Words:
    """fANOVA (Hutter et al. 2014) over resampled trials: how much of the spread of results each setting explains."""
    complete = [trial for trial in source.trials.values() if trial.state == TrialState.COMPLETE]
    if len(complete) < ENOUGH:
        return Words(
            f"Which setting matters most cannot be said from {len(complete)} trials trained to the end: it takes at least "
            f"{ENOUGH}."
        )
    found = forests(complete)
    if not found:
        return Words("Which setting matters most cannot be said: all trials have the same settings or the same result.")
    return _bars(source, found, complete)


def forests(trials: Sequence[FrozenTrial], seed: int = 0) -> dict[str, list[float]]:
    """Each setting's share in `FORESTS` forests, each fitted to trials drawn with replacement.

    Drawn trials that do not differ in settings and result make no forest; without any the answer is empty.
    """
    generator = np.random.default_rng(seed)
    shares: dict[str, list[float]] = {}
    for forest in range(FORESTS):
        drawn = [trials[i] for i in generator.integers(0, len(trials), min(len(trials), DRAWN))]
        again = optuna.create_study()
        again.add_trials(drawn)
        evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=seed + forest)
        with contextlib.suppress(RuntimeError):  # fANOVA's word for trees without a split
            for name, share in evaluator.evaluate(again).items():
                shares.setdefault(name, []).append(share)
    return shares


def _bars(source: Source, found: Mapping[str, Sequence[float]], trials: Sequence[FrozenTrial]) -> Plot:
    middle = {name: float(np.median(shares)) for name, shares in found.items()}
    names = sorted(middle, key=lambda name: middle[name])
    bounds = {name: np.percentile(found[name], (2.5, 97.5)) for name in names}
    absent = sorted({name for trial in trials for name in trial.params} - set(names))
    left = f" Left out, as not every trial has it: {', '.join(absent)}." if absent else ""
    bars = {
        "type": "bar", "orientation": "h", "x": [middle[name] for name in names], "y": names,
        "marker": {"color": BLUE}, "hovertemplate": "%{y}: %{x:.2f}<extra></extra>",
        "error_x": {
            "type": "data", "symmetric": False, "color": GREY, "thickness": 2,
            "array": [float(bounds[name][1]) - middle[name] for name in names],
            "arrayminus": [middle[name] - float(bounds[name][0]) for name in names],
        },
    }  # fmt: skip
    return Plot(
        "importance", "Which settings matter",
        f"Share of the spread of {source.selection} that each setting explains by itself (fANOVA): the median of {FORESTS} "
        f"forests, each fitted to {len(trials)} trials drawn anew; the whisker holds 95 % of them.{left}",
        "Where whiskers overlap the order is not known; only trials trained to the end count, and no combinations.",
        [bars],
        {"xaxis": axis("share explained", range=[0, 1]), "yaxis": axis(""), "showlegend": False},
        height=max(220, 90 + 34 * len(names)),
    )  # fmt: skip
