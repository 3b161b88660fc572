"""The model card: the manifest in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from medtune.evidence.intervals import in_words
from medtune.record import plain

WAYS = (("at_threshold", "threshold", "after"), ("argmax", "most probable, not calibrated", "before"))
DECIDED = ("oa", "sensitivity", "specificity", "f1", "auc")


def render(about: Mapping[str, Any]) -> str:
    """MODEL_CARD.md of a manifest's content."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("medtune.deploy", "."), undefined=jinja2.StrictUndefined)
    return environment.get_template("card.md.jinja").render(**plain(about), lines=_lines(about["metrics"])) + "\n"


def _lines(figures: Mapping[str, Any]) -> list[list[str]]:
    """A line for each split and way of deciding."""
    lines = []
    for split, found in figures.items():
        for kind, label, probs in WAYS:
            if found[kind] is not None:
                decided = [in_words(found[kind][name]) if name in found[kind] else "" for name in DECIDED]
                rest = [in_words(found[probs][name]) for name in ("ece", "brier")]
                lines.append([split, str(found["n"]), label, *decided, *rest])
        if found.get("without_leaked"):
            lines += _lines({f"{split}, without leaked images": found["without_leaked"]})
    return lines
