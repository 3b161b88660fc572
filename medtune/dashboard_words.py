"""What Optuna's dashboard shows of a trial beside its parameters: the ledger's nested facts as flat, readable ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from medtune.audit import sentence
from medtune.progress import seconds_of
from medtune.results import SYNTHETIC, Study
from medtune.search.ledger import Row

Fact = str | int | float
_BOUNDS = ("low", "high")


def facts(row: Row) -> dict[str, Fact]:
    """A trial's user attributes: figures by their names, their intervals, settings that are no parameters, faults, rungs."""
    found: dict[str, Fact] = {}
    latest = row.latest
    for part, epoch in (("best", "best epoch"), ("external", "external tested at epoch")):
        found |= dict(_figures(latest.get(part, {}), epoch))
    settings = {name: value for name, value in (row.settings or {}).items() if name not in row.params}
    found |= {f"setting {name}": _plain(value) for name, value in settings.items()}
    found |= dict(_rungs(row))
    if latest.get("seconds"):
        found["seconds"] = round(seconds_of(row), 1)
    found |= {name: latest[name] for name in ("node", "micro_batch") if latest.get(name) is not None}
    if row.attempt > 1:
        found["attempts"] = row.attempt
    if row.faults:
        found["faults"] = row.faults
    found |= {f"error of attempt {attempt}": cause for attempt, cause in row.errors.items()}
    return found | ({"cause": row.cause} if row.cause else {})


def about(study: Study) -> dict[str, Fact]:
    """A study's user attributes."""
    record = study.record
    named = {name: str(record[name]) for name in ("script", "preset", "selection")}
    sets = {"trained on": record["settings"]["pair"], "external test set": record["data"]["external_name"]}
    return named | sets | {"rungs at epochs": _plain(record["rungs"]) or "none", "kept in": study.where}


def note(study: Study) -> str:
    """What has to be known to read the figures, in Markdown."""
    lines = [
        f"The value is **{study.selection}** at a trial's best epoch so far; its other figures are of the same weights, "
        "but for an external test that is older (*external tested at epoch*).",
        "`external*/...` and `test/...` never reached the search. A trial that is picked by them has seen their labels: "
        "the figure is then optimistic and cannot stand as the test of it.",
        "This page shows the study and changes nothing in it.",
    ]
    if leaks := sentence(study):
        lines.insert(2, f"External set: {leaks}.")
    return "\n\n".join([f"**{SYNTHETIC.strip()}**", *lines] if study.record["synthetic"] else lines)


def _figures(metrics: Mapping[str, Any], epoch: str) -> Iterator[tuple[str, Fact]]:
    # What was trained on says the least, and the dashboard shows the first lines alone.
    for name, value in sorted(metrics.items(), key=lambda item: item[0].startswith("train/")):
        if name == "epoch":
            yield epoch, value
        elif name.rpartition("/")[2] in _BOUNDS or value is None:
            continue
        else:
            yield name, float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
        low, high = (metrics.get(f"{name}/{bound}") for bound in _BOUNDS)
        if low is not None and high is not None:
            yield f"{name} 95 %", f"{low:.4f} to {high:.4f}"


def _rungs(row: Row) -> Iterator[tuple[str, Fact]]:
    for name in row.attrs:
        if name.startswith("rung:"):
            epoch = int(name.removeprefix("rung:"))
            rung = row.rung(epoch) or {}
            value = "no value" if rung.get("value") is None else f"{rung['value']:.4f}"
            yield f"rung at epoch {epoch}", f"{'kept' if rung.get('kept') else 'stopped'} at {value}"


def _plain(value: Any) -> Fact:
    if isinstance(value, list | tuple):
        return ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    return value if isinstance(value, str | int | float) else str(value)
