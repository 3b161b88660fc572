"""What decisions rest on: the Grad-CAM contact sheets that `medtune gradcam` left, within the page."""

from __future__ import annotations

import base64

from medtune.report.parts import Picture, Section, Words
from medtune.report.source import Source
from medtune.results import sheets

SHOWS = "The trial's surest {kind} on {split}; what spoke for the positive class lies over each image in warm colours."
CAUTION = "A map shows where the model looked, not that it looked there for a good reason; a few images stand for no others."


def rests(source: Source) -> Section:
    """The sheets of the trial that the page names; how to draw them where there are none."""
    section = ("rests", "What decisions rest on")
    if not source.complete:
        return Section(*section, [Words("No trial was trained to the end.")])
    number = source.choice["chosen"]["trial"] if source.choice else source.complete[0].number
    drawn = sheets(source.study, number)
    if not drawn:
        told = f"`medtune gradcam {source.study.name} {number}` draws what trial {number} looks at, for the next page."
        return Section(*section, [Words(told)])
    return Section(*section, [_picture(source, number, sheet.stem, sheet.read_bytes()) for sheet in drawn])


def _picture(source: Source, number: int, name: str, png: bytes) -> Picture:
    split, _, kind = name.partition("-")
    where = source.split(split)
    shows = SHOWS.format(kind=kind, split=where)
    data = "data:image/png;base64," + base64.b64encode(png).decode()
    return Picture(f"Trial {number}, {where}: {kind}", shows, CAUTION, data)
