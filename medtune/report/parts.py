"""What a page is made of: sections of words, tables and plots; plots as plotly.js takes them, in plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
COLOURS = (ORANGE, BLUE, GREEN, PINK, SKY, YELLOW)
"""Okabe and Ito's, which the colour-blind tell apart; those that are seen on white and on black alike."""
GREY = "#8a929b"
MARKS = {"COMPLETE": "circle", "PRUNED": "x-thin-open", "FAIL": "triangle-down", "RUNNING": "circle-open"} | {
    "WAITING": "square-open"
}  # fmt: skip
"""By a trial's state: no colour says alone what it was."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Plot:
    """One picture, with the sentences beneath it."""

    id: str
    title: str
    shows: str
    """One sentence: what is to be seen. It is the picture's text for those who do not see it as well."""
    caution: str
    """One sentence: what is not to be read into it."""
    data: Sequence[Mapping[str, Any]]
    """plotly.js's traces."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    width: int = 0
    """Least width in px; a screen that has less scrolls it in its own box."""
    height: int = 380

    @property
    def json(self) -> dict[str, Any]:
        """What plotly.js draws."""
        return {"data": list(self.data), "layout": dict(self.layout) | {"height": self.height}}


@dataclass(frozen=True)
class Picture:
    """A picture as it is, with the sentences beneath it."""

    title: str
    shows: str
    caution: str
    data: str
    """A data URI."""


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first column names the row."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    sortable: bool = False
    strong: frozenset[int] = frozenset()
    """Rows that stand out."""


@dataclass(frozen=True)
class Words:
    """A paragraph, or what needs care."""

    text: str
    kind: str = ""
    """`loud`: nothing may be decided without it; `soft`: beside the point; else plain."""


Block = Plot | Picture | Table | Words


@dataclass(frozen=True)
class Section:
    """One question of the page, and its answer."""

    id: str
    title: str
    blocks: Sequence[Block]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, "automargin": True, **more}


def points(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, symbol: str, **more: Any) -> dict[str, Any]:
    """Marks; `text` in `more` is what is told of each."""
    marker = {"color": colour, "symbol": symbol, "size": 9, "line": {"width": 1.5, "color": colour}}
    return {"type": "scatter", "mode": "markers", "x": x, "y": y, "name": name, "marker": marker} | more


def line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, dash: str = "solid", **more: Any) -> dict[str, Any]:
    """A line; None in `y` is a gap."""
    style = {"color": colour, "dash": dash, "width": more.pop("thick", 2)}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": style} | more


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> dict[str, Any]:
    """The area between two lines over the same x."""
    around = {"x": [*x, *reversed(x)], "y": [*low, *reversed(high)]}
    return {
        "type": "scatter", "mode": "lines", "fill": "toself", "fillcolor": f"{colour}2e", "line": {"width": 0},
        "hoverinfo": "skip", "showlegend": False, **around,
    }  # fmt: skip


def three(value: float | None) -> str:
    """A figure in three digits after the point."""
    return "-" if value is None else f"{value:.3f}"


def within(value: float | None, low: float | None, high: float | None) -> str:
    """A figure and its interval: `0.912 [0.887, 0.934]`; a line may break before the interval, not in it."""
    return three(value) + (f" [{low:.3f},\u00a0{high:.3f}]" if low is not None and high is not None else "")


def spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """An even choice of at most `most`, in order, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
