"""Pictures of one trial's predictions: confusion matrices and ROC curves, a split beside the other."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medtune.curves import COLOURS
from medtune.metrics import classification, confusion, roc, softmax
from medtune.predictions import Predicted, Predictions

_DPI = 110


def draw_confusion(predictions: Predictions, classes: Sequence[str], title: str) -> Figure:
    """A matrix for each split: images by true class (row) and decided class (column), coloured by their share of the row.

    The decision is the most probable class.
    """
    side = 2.1 + 0.55 * len(classes)
    figure = Figure(figsize=(side * len(predictions) + 0.6, side + 1.1), layout="constrained")
    figure.suptitle(f"{title}: decided by the most probable class", fontsize=11, fontweight="bold")
    panels = figure.subplots(1, len(predictions), squeeze=False)[0]
    for place, (panel, (split, found)) in enumerate(zip(panels, predictions.items(), strict=True)):
        _matrix(panel, confusion(softmax(found.logits), found.labels), classes, named=place == 0)
        panel.set_title(f"{split}, {len(found.labels)} images", loc="left", fontsize=10)
    return figure


def draw_roc(predictions: Predictions, classes: Sequence[str], title: str) -> Figure:
    """ROC curves with their AUC: of two classes, one panel with a curve for each split; of more, a panel for each split
    with a curve for each class against the rest.
    """
    if len(classes) == 2:
        panels = {f"positive: {classes[1]}": [(split, found, 1) for split, found in predictions.items()]}
    else:
        panels = {
            f"{split}: each class against the rest": [(name, found, label) for label, name in enumerate(classes)]
            for split, found in predictions.items()
        }
    figure = Figure(figsize=(5.2 * len(panels), 5.4), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (head, curves) in zip(drawn, panels.items(), strict=True):
        panel.set_title(head, loc="left", fontsize=10)
        _curves(panel, curves)
    return figure


PICTURES: dict[str, Callable[[Predictions, Sequence[str], str], Figure]] = {"confusion": draw_confusion, "roc": draw_roc}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _matrix(panel: Axes, counts: np.ndarray, classes: Sequence[str], *, named: bool) -> None:
    """`named`: with the classes' names at the rows, which the other panels share."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 11 if len(classes) <= 3 else 7
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.55 else "black"
        words = f"{count}\n{shares[row, column]:.0%}"
        panel.text(column, row, words, ha="center", va="center", color=colour, fontsize=size)
    places = range(len(classes))
    panel.set_xticks(places, classes, rotation=0 if len(classes) <= 3 else 90, fontsize=9)
    panel.set_yticks(places, classes if named else [""] * len(classes), fontsize=9)
    panel.set_xlabel("decided")
    if named:
        panel.set_ylabel("true")


def _curves(panel: Axes, curves: Sequence[tuple[str, Predicted, int]]) -> None:
    panel.plot([0, 1], [0, 1], color="#8a929b", linestyle=":", linewidth=1)
    for place, (name, found, positive) in enumerate(curves):
        scores = softmax(found.logits)[:, positive]
        against = np.stack((1 - scores, scores), axis=1)
        truth = found.labels == positive
        area = classification(against, truth)["auc"]
        points = roc(against, truth)
        words = f"{name}: undefined, a class is missing" if area is None else f"{name}: AUC {area:.3f}"
        panel.plot(points["fpr"], points["tpr"], color=COLOURS[place % len(COLOURS)], linewidth=1.7, label=words)
    panel.set_xlabel("1 - specificity")
    panel.set_ylabel("sensitivity")
    panel.set_aspect("equal")
    panel.grid(color="#e3e6ea", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower right", fontsize=9, frameon=False)
