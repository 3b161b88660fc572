"""`medtune curves`: how trials learned, drawn as the report draws it: six figures over the epochs, train and val."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from medtune.config import StudyConfig, TrialConfig
from medtune.errors import ConfigError, StudyError, unknown
from medtune.progress import brief
from medtune.results import SYNTHETIC, Study, epochs, rank, trial_config
from medtune.search.conductor import minimised
from medtune.search.ledger import Row

PANELS = {"loss": "loss", "oa": "OA", "auc": "AUC", "sensitivity": "sensitivity", "specificity": "specificity", "f1": "F1"}
FORMATS = (".png", ".svg", ".pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart, less their yellow, which is faint on white."""

_RING: dict[str, Any] = {"markersize": 8, "markerfacecolor": "white", "markeredgewidth": 2}


@dataclass(frozen=True)
class Curves:
    """What is drawn of one trial."""

    row: Row
    state: str
    config: TrialConfig
    lines: list[dict[str, Any]]
    """Its record, one line an epoch."""

    @property
    def ended(self) -> int:
        """Its last epoch so far."""
        return int(self.lines[-1]["epoch"])

    @property
    def ended_early(self) -> bool:
        """Whether it was pruned or failed, and will not go on."""
        return self.row.finished and self.ended < self.config.epochs

    def values(self, name: str) -> list[float]:
        """A figure by epoch; NaN where it is undefined, so that the line has a gap."""
        found = (line["metrics"].get(name) for line in self.lines)
        return [math.nan if value is None else float(value) for value in found]

    def best(self) -> int | None:
        """The epoch with the best weights so far."""
        epoch = self.lines[-1].get("best_epoch")
        return epoch if any(line["epoch"] == epoch for line in self.lines) else None

    def label(self) -> str:
        """The legend's words: number, state, settings, best epoch and its value."""
        best, value = self.best(), self.lines[-1].get("best_value")
        found = f"best epoch {best}, {self.config.selection} {value:.4f}" if best and value is not None else "no best epoch"
        state = self.state if self.state == "COMPLETE" else f"{self.state} at epoch {self.ended}"
        settings = self.row.settings or {}
        return f"trial {self.row.number}, {state}: {found}\n{brief({'model': self.config.model, **settings})}"


def draw(study: Study, numbers: Sequence[int], path: Path) -> list[int]:
    """Draw these trials, or without numbers the best three, to `path`; returns the trials drawn.

    Raises ConfigError for a suffix other than `FORMATS` or an unknown trial, StudyError for a trial without epochs and
    where the picture cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"a picture's name must end in one of {', '.join(FORMATS)}, got {path.name!r}")
    chosen = [_curves(study, row) for row in _rows(study, numbers)]
    figure = _figure(study, chosen)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror}. Name another file with -o") from None
    return [curves.row.number for curves in chosen]


def rung_epochs(study: Study, config: TrialConfig) -> tuple[int, ...]:
    """Epochs at which ASHA decides on a trial."""
    settings = study.record["settings"]
    return StudyConfig(first_rung=settings["first_rung"], reduction=settings["reduction"], trial=config).rungs()


def drop_epochs(config: TrialConfig) -> tuple[int, ...]:
    """Epochs after which the learning rate drops."""
    return config.milestone_epochs() if config.schedule == "milestones" else ()


def _rows(study: Study, numbers: Sequence[int]) -> list[Row]:
    by_number = {row.number: row for row in study.rows}
    for number in numbers:
        if number not in by_number:
            raise ConfigError(unknown(f"trial of study {study.name!r}", str(number), map(str, by_number)))
    if numbers:
        return [by_number[number] for number in dict.fromkeys(numbers)]
    chosen = rank(study, study.selection)[:3] or _leading(study)[:3]
    if not chosen:
        raise StudyError(f"no trial of study {study.name!r} has finished an epoch yet: nothing to draw")
    return chosen


def _leading(study: Study) -> list[Row]:
    """While none was trained to the end: those that have epochs, best so far first."""
    sign = 1 if minimised(study.selection) else -1
    begun = [row for row in study.rows if row.value is not None and row.epoch]
    return sorted(begun, key=lambda row: (sign * (row.value or 0.0), row.number))


def _curves(study: Study, row: Row) -> Curves:
    lines = [line for line in epochs(study, row) if line.get("metrics")]
    if not lines:
        raise StudyError(f"trial {row.number} of study {study.name!r} ({study.state(row)}) has no epochs to draw")
    return Curves(row, study.state(row), trial_config(study, row), lines)


def _figure(study: Study, chosen: Sequence[Curves]) -> Figure:
    colours = _colours(len(chosen))
    legend_inches = 0.2 + 0.42 * len(chosen)
    figure = Figure(figsize=(13, 7.2 + legend_inches))
    panels = figure.subplots(2, 3, sharex=True)
    total = max(curves.config.epochs for curves in chosen)
    rungs = sorted({epoch for curves in chosen for epoch in rung_epochs(study, curves.config)})
    for panel, (metric, head) in zip(panels.flat, PANELS.items(), strict=True):
        _frame(panel, head, total, rungs)
        for place, (curves, colour) in enumerate(zip(chosen, colours, strict=True)):
            _draw_trial(panel, curves, metric, colour, place)
    for panel in panels[1]:
        panel.set_xlabel("epoch")
    title = f"{study.name}: {_title(chosen)}" + (f"\n{SYNTHETIC.strip()}" if study.record["synthetic"] else "")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    if _spread(chosen) > 20:
        panels.flat[0].set_yscale("log")
        panels.flat[0].yaxis.set_major_formatter("{x:g}")
        panels.flat[0].set_title(f"{PANELS['loss']}, logarithmic", loc="left", fontsize=11)
    height = figure.get_figheight()
    top = 1.15 if study.record["synthetic"] else 0.95  # inches
    figure.subplots_adjust(left=0.05, right=0.985, top=1 - top / height, bottom=(legend_inches + 0.55) / height, hspace=0.16)
    _legend(figure, chosen, colours, rungs, 1 - (top - 0.6) / height)
    return figure


def _colours(count: int) -> Sequence[Any]:
    if count <= len(COLOURS):
        return COLOURS[:count]
    return [colormaps["viridis"](place / (count - 1)) for place in range(count)]


def _spread(chosen: Sequence[Curves]) -> float:
    """The largest loss over the smallest: a single diverging trial must not flatten the others."""
    values = [value for c in chosen for split in ("train", "val") for value in c.values(f"{split}/loss") if value > 0]
    return max(values) / min(values) if values else 1.0


def _title(chosen: Sequence[Curves]) -> str:
    numbers = ", ".join(str(curves.row.number) for curves in chosen)
    return f"trial{'s' if len(chosen) > 1 else ''} {numbers}"


def _frame(panel: Axes, head: str, total: int, rungs: Sequence[int]) -> None:
    panel.set_title(head, loc="left", fontsize=11)
    margin = max(0.5, total * 0.02)
    panel.set_xlim(1 - margin, total + margin)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    for epoch in rungs:
        panel.axvline(epoch, color="#8a929b", linestyle=":", linewidth=1)


def _draw_trial(panel: Axes, curves: Curves, metric: str, colour: Any, place: int) -> None:
    at = [line["epoch"] for line in curves.lines]
    dot = "." if len(at) <= 20 else None  # a single epoch makes no line
    panel.plot(at, curves.values(f"train/{metric}"), color=colour, linestyle="--", linewidth=1.1, marker=dot, alpha=0.8)
    val = curves.values(f"val/{metric}")
    panel.plot(at, val, color=colour, linewidth=1.7, marker=dot)
    best = curves.best()
    if best is not None:
        panel.plot([best], [val[at.index(best)]], "o", color=colour, zorder=4, **_RING)
    if curves.ended_early:
        panel.plot([at[-1]], [val[-1]], "x", markersize=9, color=colour, mew=2, zorder=4)
    drops = drop_epochs(curves.config)
    height = 0.02 + 0.045 * place  # trials that share their milestones do not hide each other's
    panel.plot(drops, [height] * len(drops), "v", color=colour, markersize=5, transform=panel.get_xaxis_transform())


def _legend(figure: Figure, chosen: Sequence[Curves], colours: Sequence[Any], rungs: Sequence[int], top: float) -> None:
    grey = "#4a5158"
    keys = [
        Line2D([], [], color=grey, linewidth=1.7, label="val"),
        Line2D([], [], color=grey, linewidth=1.1, linestyle="--", label="train"),
        Line2D([], [], color=grey, marker="o", linestyle="", label="best epoch", **_RING),
    ]
    if any(drop_epochs(curves.config) for curves in chosen):
        keys.append(Line2D([], [], color=grey, marker="v", linestyle="", label="milestone: the learning rate drops"))
    if rungs:
        keys.append(Line2D([], [], color="#8a929b", linestyle=":", label="rung"))
    if any(curves.ended_early for curves in chosen):
        keys.append(Line2D([], [], color=grey, marker="x", markersize=9, linestyle="", mew=2, label="ended early"))
    figure.legend(
        handles=keys, ncols=len(keys), frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, top)
    )
    trials = [Line2D([], [], color=c, linewidth=3, label=t.label()) for t, c in zip(chosen, colours, strict=True)]
    figure.legend(handles=trials, loc="lower left", frameon=False, fontsize=10, bbox_to_anchor=(0.03, 0.0))
