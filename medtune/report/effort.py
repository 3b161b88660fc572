"""How the search got on: the best so far over time and over hours of computing, and what early stopping saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from medtune.progress import brief, duration, saved, seconds_of, some
from medtune.report.parts import BLUE, MARKS, ORANGE, Plot, Section, Words, axis, line, points
from medtune.report.source import Source
from medtune.results import trial_config
from medtune.search.ledger import Row
from medtune.usage import UNITS, lines, read_usage

MOST = 2000
"""Points drawn at most."""


def progress(source: Source) -> Section:
    """The best so far, and the cost."""
    ended = sorted((row for row in source.complete if source.ended(row) is not None), key=lambda row: source.ended(row) or 0)
    blocks: list[Any] = [Words("No trial was trained to the end yet.")]
    if ended:
        hours, unit = computing(source)
        start = min(began for row in source.study.rows if (began := source.began(row)) is not None)
        clock = [((source.ended(row) or 0) - start) / 3600 for row in ended]
        spent = _spent(source, ended, hours)
        blocks = [
            _best_so_far(
                source, ended, clock, "best-time", "Best so far over time", "hours since the first trial began",
                "Time in which nobody ran the study counts as well.",
            ),
            _best_so_far(
                source, ended, spent, "best-hours", f"Best so far over {unit}s", f"{unit}s of all trials that had ended",
                "Trials that were being trained meanwhile count only when they end.",
            ),
        ]  # fmt: skip
    return Section("progress", "How the search got on", [*blocks, *map(Words, cost(source))])


def computing(source: Source) -> tuple[dict[int, float], str]:
    """What each trial took of the machines, by number, and in which unit: GPU-hours, core-hours or hours of training.

    What was counted for a model (`usage.json`) is shared out among its trials by the time they took.
    """
    seconds = {row.number: seconds_of(row) for row in source.study.rows}
    usage = read_usage(source.study.folder)
    unit = next((unit for unit in UNITS if usage.get(unit, {}).get("hours_by_model")), None)
    if unit is None:
        return {number: found / 3600 for number, found in seconds.items()}, "training-hour"
    model_of = {row.number: trial_config(source.study, row).model for row in source.study.rows}
    total: dict[str, float] = defaultdict(float)
    for number, model in model_of.items():
        total[model] += seconds[number]
    counted = usage[unit]["hours_by_model"]
    shares = {n: seconds[n] / total[model] if total[model] else 0.0 for n, model in model_of.items()}
    return {n: counted.get(model, 0.0) * shares[n] for n, model in model_of.items()}, f"{UNITS[unit]}-hour"


def _spent(source: Source, ended: Sequence[Row], hours: dict[int, float]) -> list[float]:
    """Hours of all trials, stopped and failed ones too, that had ended when each of `ended` did."""
    moments = sorted((moment, hours[row.number]) for row in source.study.rows if (moment := source.ended(row)) is not None)
    upto = np.cumsum([spent for _, spent in moments])
    places = np.searchsorted([moment for moment, _ in moments], [source.ended(row) or 0 for row in ended], side="right")
    return [float(upto[place - 1]) for place in places]


def _best_so_far(
    source: Source, ended: Sequence[Row], x: Sequence[float], id: str, title: str, along: str, caution: str
) -> Plot:
    values = [row.value or 0.0 for row in ended]
    running = (np.minimum if source.minimise else np.maximum).accumulate(values).tolist()
    told = [f"trial {row.number}: {row.value:.4f}<br>{brief(row.settings or {})}" for row in ended]
    step = max(1, -(-len(ended) // MOST))
    way = "lowest" if source.minimise else "highest"
    left = "" if step == 1 else f" Every {step}th trial is drawn."
    return Plot(
        id, title,
        f"Each mark is a trial trained to the end; the line is the {way} {source.selection} so far, {running[-1]:.4f} at "
        f"the end.{left}",
        f"{caution} The best so far can only get better: a late step may be luck.",
        [
            line(x, running, "best so far", ORANGE, line={"shape": "hv", "color": ORANGE, "width": 2.5}),
            points(x[::step], values[::step], "trial", BLUE, MARKS["COMPLETE"], text=told[::step], hoverinfo="text"),
        ],
        {"xaxis": axis(along, rangemode="tozero"), "yaxis": axis(source.selection, range=_frame(values, running))},
        height=320,
    )  # fmt: skip


def _frame(values: Sequence[float], running: Sequence[float]) -> list[float]:
    """The range that is drawn: a trial that diverged must not flatten the others."""
    usual = np.percentile(values, (0, 90)) if running[-1] <= np.median(values) else np.percentile(values, (10, 100))
    low, high = min(*usual, *running), max(*usual, *running)
    margin = 0.06 * (high - low) or 0.01
    return [float(low - margin), float(high + margin)]


def cost(source: Source) -> list[str]:
    """What early stopping saved and what the machines did, in words."""
    epochs, seconds = saved(source.study.rows, source.study.record["settings"]["epochs"])
    done = sum(row.epoch for row in source.study.rows)
    spent = sum(map(seconds_of, source.study.rows))
    stopped = sum(row.state == "PRUNED" for row in source.study.rows)
    if source.study.record.get("planned"):
        said = [f"The plan stops no trial early: {done} epochs in {duration(spent)} of training."]
    elif epochs:
        said = [
            f"Early stopping ended {some(stopped, 'trial')} before their time and so saved {epochs} of {done + epochs} "
            f"epochs, about {duration(seconds)} beside the {duration(spent)} that were spent (each at its own pace)."
        ]
    else:
        said = [f"Early stopping has saved nothing: {done} epochs in {duration(spent)} of training."]
    return said + [text.strip() for text in lines(read_usage(source.study.folder))]
