"""The report's tables with our figures beside them: cell by cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean
from typing import Any

from medtune import reference
from medtune.compare import words
from medtune.compare.match import SECTIONS, Trial, matches, matches_any, read_trial
from medtune.config import Schedule
from medtune.reference import ReportRow
from medtune.results import Study

LOGIT = "auc_logit"
"""AUC by the raw logit of class 1, as the scripts computed it; the record has it beside `auc`."""


@dataclass(frozen=True)
class Cell:
    """One figure of the report, and ours in one section."""

    metric: str
    report: Decimal
    source: str
    """The name our figure has in a trial's record: `train/oa`."""
    values: Mapping[int, float]
    """Ours by trial number; trials in which it is undefined are left out."""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return fmean(self.values.values()) if self.values else None

    @property
    def low(self) -> float | None:
        return min(self.values.values(), default=None)

    @property
    def high(self) -> float | None:
        return max(self.values.values(), default=None)

    @property
    def difference(self) -> float | None:
        """Our mean less the report's figure."""
        return None if self.mean is None else self.mean - float(self.report)

    @property
    def better(self) -> bool:
        """Whether our mean is at least as good as the report's figure."""
        return self.difference is not None and (self.difference <= 0 if self.metric == "loss" else self.difference >= 0)


@dataclass(frozen=True)
class Section:
    """Our trials of one row under one schedule."""

    schedule: Schedule
    complete: tuple[int, ...]
    """Numbers of the trials that were trained to the end: the replicates."""
    unfinished: Mapping[str, tuple[int, ...]]
    """Numbers of the others by state."""
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return SECTIONS[self.schedule]

    @property
    def state(self) -> str:
        """`run`, `not run`, or what became of the trials, none of which was trained to the end."""
        if self.complete:
            return "run"
        parts = (f"{len(numbers)} {state}" for state, numbers in self.unfinished.items())
        return ", ".join(parts) or "not run"


@dataclass(frozen=True)
class Entry:
    """One row of a table of the report, with ours beside it."""

    row: ReportRow
    label: str
    mark: str
    """A letter that points to a footnote, or nothing."""
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class ComparedTable:
    """One table of the report."""

    name: str
    title: str
    about: str
    """What ours were measured on."""
    caution: bool
    """Whether these are other images than the report's."""
    heads: Mapping[str, str]
    """Metric -> column head."""
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A study beside the report."""

    study: str
    synthetic: bool
    loud: tuple[str, ...]
    """In what ours are not the report's experiment."""
    quiet: tuple[str, ...]
    """What else differs, and how to read the tables."""
    trials: tuple[str, ...]
    """What became of the study's trials: those that count, and each kind that does not, by number."""
    tables: tuple[ComparedTable, ...]
    footnotes: Mapping[str, str]


def compare(study: Study) -> Comparison:
    """The report's tables with a study's figures beside them."""
    trials = [read_trial(study, row) for row in study.rows]
    ours = {schedule: [t for t in trials if matches_any(t.config, schedule)] for schedule in SECTIONS}
    schedules = [schedule for schedule in SECTIONS if ours[schedule]]
    if not schedules:
        schedules = [study.record["settings"].get("schedule", "milestones")]
    counted = [trial for schedule in schedules for trial in ours[schedule]]
    tables = tuple(_table(study, name, counted, schedules) for name in _TABLES)
    return Comparison(
        study=study.name,
        synthetic=bool(study.record["synthetic"]),
        loud=tuple(words.loud(study, counted)),
        quiet=tuple(words.quiet(study, counted)),
        trials=tuple(words.account(trials, counted)),
        tables=tables,
        footnotes=words.FOOTNOTES,
    )


_ALL = {"oa": "OA", "sensitivity": "sens.", "specificity": "spec.", "f1": "F1", "auc": "AUC"}
_OWN = {"oa": "OA train", "auc": "AUC train", "authors_oa": "OA test", "authors_auc": "AUC test"}
_TABLES = {
    "3": ("Table 3: train", {**_ALL, "loss": "loss"}),
    "4": ("Table 4: validation", {**_ALL, "loss": "loss"}),
    "5": ("Table 5: CPN X-ray test", _ALL),
    "6": ("Table 6: the report's own (train) and the architectures' authors' (test)", _OWN),
    "7.1": ("Appendix 7.1: MedMamba-s, train", {**_ALL, "loss": "loss"}),
    "7.2": ("Appendix 7.2: MedMamba-s, validation", {**_ALL, "loss": "loss"}),
    "7.3": ("Appendix 7.3: MedMamba-s, CPN X-ray test", _ALL),
}
_MARKS = {("6", "medmamba_s"): "a", ("6", "medvit_large"): "b", ("6", "medvit_base"): "c"}


def _table(study: Study, name: str, trials: Sequence[Trial], schedules: Sequence[str]) -> ComparedTable:
    title, heads = _TABLES[name]
    prefix, about = _measured(study, name)
    entries = []
    for row in reference.table(name):
        matching = [trial for trial in trials if matches(trial.config, row)]
        sections = tuple(_section(row, schedule, matching, prefix) for schedule in schedules)
        label = row.describe() if name.startswith("7") else reference.MODELS[row.model]
        gamma_alone = name.startswith("7") and (row.optimizer, row.lr) in _REPEATED
        mark = "d" if gamma_alone else _MARKS.get((name, row.model), "")
        entries.append(Entry(row, label, mark, sections))
    caution = row.split == "cpn" and not study.record["verified_cpn"]
    return ComparedTable(name, title, about, caution, heads, tuple(entries))


_REPEATED = {("adam", 1e-3), ("sgd", 1e-3)}
"""Optimizer and rate of the appendix's rows that differ from another row in gamma alone."""


def _measured(study: Study, table: str) -> tuple[str, str]:
    """The prefix of our figures for a table, and what they were measured on, in words."""
    kind = "val" if table in ("4", "7.2") else "external" if table in ("5", "7.3") else "train"
    pair = study.record["settings"]["pair"]
    if kind != "external":
        own = f"{pair}, at the last epoch"
        return kind, own if table != "6" else f"{own}; test: own test split, at the best weights by {study.selection}"
    at = f"images as they are, at the best weights by {study.selection}"
    if study.record["verified_cpn"]:
        return "cpn", f"CPN X-ray (verified), {at}"
    return kind, f"NOT CPN X-ray: {study.record['data']['external_name']}, {at}"


def _section(row: ReportRow, schedule: Any, trials: Iterable[Trial], prefix: str) -> Section:
    here = [trial for trial in trials if trial.config.schedule == schedule]
    complete = [trial for trial in here if trial.state == "COMPLETE"]
    unfinished: dict[str, tuple[int, ...]] = {}
    for trial in here:
        if trial.state != "COMPLETE":
            unfinished[trial.state] = (*unfinished.get(trial.state, ()), trial.row.number)
    cells = [_cell(metric, figure, _source(metric, prefix), complete) for metric, figure in row.figures.items()]
    if schedule == "constant":
        by_logit = _cell(LOGIT, row.figures["auc"], f"{prefix}/{LOGIT}", complete)
        cells += [by_logit] if by_logit.values else []
    return Section(schedule, tuple(t.row.number for t in complete), unfinished, tuple(cells))


def _source(metric: str, prefix: str) -> str:
    authors = metric.removeprefix("authors_")
    return f"test/{authors}" if authors != metric else f"{prefix}/{metric}"


def _cell(metric: str, report: Decimal, source: str, trials: Iterable[Trial]) -> Cell:
    found = {trial.row.number: trial.figures.get(source) for trial in trials}
    values = {n: float(v) for n, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}
    return Cell(metric, report, source, values)
