"""The page: sections in the reader's order, in one file that needs no network."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from importlib.resources import files
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from medtune.errors import StudyError
from medtune.report.answer import answer
from medtune.report.beside import beside
from medtune.report.effort import progress
from medtune.report.finalists import finalists
from medtune.report.learning import learning
from medtune.report.parts import Picture, Plot, Section, Table, Words
from medtune.report.rests import rests
from medtune.report.source import Source, read_source
from medtune.report.space import space
from medtune.report.transfer import transfer
from medtune.report.trials import failures, trials
from medtune.results import Study

FILE = "report.html"


def write(study: Study, path: Path) -> Path:
    """Write a study's page to `path`, whole or not at all, and return it. Raises StudyError where that cannot be."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(to_html(read_source(study)))
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise StudyError(f"cannot write {path}: {error.strerror}. Name another file with -o") from None
    return path


def to_html(source: Source) -> str:
    """The page of a study."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("medtune.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    env.tests |= {"plot": lambda x: isinstance(x, Plot), "table": lambda x: isinstance(x, Table)}
    env.tests |= {"words": lambda x: isinstance(x, Words), "picture": lambda x: isinstance(x, Picture)}
    return env.get_template("page.html.jinja").render(
        source=source,
        sections=sections(source),
        at=_clock(source.now),
        begun=_clock(source.study.record["created"]),
        style=_text("page.css"),
        script=_text("page.js"),
        plotly=_plotly(),
    )


def sections(source: Source) -> list[Section]:
    """All of them, in the reader's order."""
    parts = (answer, progress, space, learning, finalists, rests, transfer, beside, failures, trials)
    return [part(source) for part in parts]


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(moment))


def _text(name: str) -> str:
    return (files("medtune.report") / name).read_text()


@functools.cache
def _plotly() -> str:
    return get_plotlyjs()
