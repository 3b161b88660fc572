"""A comparison on the screen, as flat rows, as CSV and as a page."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medtune.compare.build import LOGIT, Cell, ComparedTable, Comparison, Entry, Section
from medtune.errors import StudyError
from medtune.results import SYNTHETIC

LOGIT_LABEL = "AUC by raw logit (as the scripts)"


def flat(comparison: Comparison) -> list[dict[str, Any]]:
    """One plain row a figure of the report and section; the columns are in the package's docstring."""
    return [
        {
            "table": table.name,
            "model": entry.row.model,
            "optimizer": entry.row.optimizer,
            "lr": entry.row.lr,
            "milestones": " ".join(map(str, entry.row.milestones)),
            "gamma": entry.row.gamma,
            "metric": cell.metric,
            "report": str(cell.report),
            "section": section.name,
            "source": cell.source,
            "measured_on": table.about,
            "n": cell.n,
            "mean": cell.mean,
            "low": cell.low,
            "high": cell.high,
            "difference": cell.difference,
            "state": section.state,
            "trials": " ".join(map(str, section.complete)),
            "footnote": comparison.footnotes.get(entry.mark, ""),
            "synthetic": comparison.synthetic,
        }
        for table in comparison.tables
        for entry in table.entries
        for section in entry.sections
        for cell in section.cells
    ]


def to_json(comparison: Comparison) -> dict[str, Any]:
    """All of a comparison in plain values."""
    return {
        "study": comparison.study,
        "synthetic": comparison.synthetic,
        "differs": list(comparison.loud),
        "notes": list(comparison.quiet),
        "trials": list(comparison.trials),
        "figures": flat(comparison),
    }


def to_csv(comparison: Comparison) -> str:
    """The flat rows as CSV; None is an empty field."""
    rows = flat(comparison)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_html(comparison: Comparison) -> str:
    """One page that needs nothing else: no script, no font, no address."""
    loader = jinja2.PackageLoader("medtune.compare", ".")
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"figure": _figure, "signed": _signed}
    page = env.get_template("page.html.jinja")
    return page.render(c=comparison, synthetic=SYNTHETIC.strip(), logit=LOGIT, logit_label=LOGIT_LABEL)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.html and compare.csv, and return their paths. Raises StudyError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "compare.html", folder / "compare.csv"]
        paths[0].write_text(to_html(comparison))
        paths[1].write_text(to_csv(comparison))
    except OSError as error:
        raise StudyError(f"cannot write to {folder}: {error.strerror}. Name another folder with -o") from None
    return paths


# --- screen ---------------------------------------------------------------------------------------------------------


def print_comparison(comparison: Comparison, console: Console) -> None:
    """For people: 80 columns are enough."""

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=not console.is_terminal)

    say(f"study {comparison.study} beside the report", "bold")
    for line in comparison.loud:
        say(line, "bold red")
    if comparison.synthetic:
        say(SYNTHETIC.strip(), "bold red")
    for line in (*comparison.trials, "", *comparison.quiet):
        say(line)
    for table in comparison.tables:
        say(f"\n{table.title}", "bold")
        say(f"ours: {table.about}", "bold red" if table.caution else "")
        console.print(_screen_table(table))
    say("")
    for mark, note in comparison.footnotes.items():
        say(f"[{mark}] {note}")
    if comparison.synthetic:
        say(SYNTHETIC.strip(), "bold red")


def _screen_table(table: ComparedTable) -> Table:
    shown = Table(box=None, pad_edge=False, show_edge=False)
    shown.add_column("")
    for head in table.heads.values():
        shown.add_column(head, justify="right", no_wrap=True)
    for entry in table.entries:
        for number, (label, cells) in enumerate(text_rows(entry, list(table.heads))):
            shown.add_row(Text(label, "bold" if number == 0 else ""), *cells)
    return shown


def text_rows(entry: Entry, metrics: list[str]) -> list[tuple[str, list[str]]]:
    """An entry's rows as texts, label and one a metric: its name alone, the report's, then ours of each section."""
    mark = f" [{entry.mark}]" if entry.mark else ""
    lines = [(f"{entry.label}{mark}", []), ("  report", [str(entry.row.figures[m]) for m in metrics])]
    for section in entry.sections:
        lines += _section_lines(section, metrics)
    return lines


def _section_lines(section: Section, metrics: list[str]) -> list[tuple[str, list[str]]]:
    if section.state != "run":
        return [(f"  {section.name}: {section.state}", [])]
    cells = {cell.metric: cell for cell in section.cells}
    count = len(section.complete)
    lines = [(f"  {section.name}, n {count}", [_mean(cells[m], count) for m in metrics])]
    if count > 1:
        lines.append(("    lowest", [_figure(cells[m].low) for m in metrics]))
        lines.append(("    highest", [_figure(cells[m].high) for m in metrics]))
    lines.append(("    difference", [_signed(cells[m].difference) for m in metrics]))
    if LOGIT in cells:
        by_logit = cells[LOGIT]
        for label, text in (
            ("  AUC by raw logit", _mean(by_logit, count)),
            ("    lowest", _figure(by_logit.low) if count > 1 else ""),
            ("    highest", _figure(by_logit.high) if count > 1 else ""),
            ("    difference", _signed(by_logit.difference)),
        ):
            if text:
                lines.append((label, [text if m == "auc" else "" for m in metrics]))
    return lines


def _mean(cell: Cell, of: int) -> str:
    """The mean, and of how many where it is undefined in some."""
    return f"({cell.n}) {_figure(cell.mean)}" if 0 < cell.n < of else _figure(cell.mean)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
