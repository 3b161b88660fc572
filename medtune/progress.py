"""What a running study shows: a table that fits the terminal, or one line per change where there is none."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from medtune.config import StudyConfig
from medtune.data import PairData
from medtune.search.conductor import Conductor
from medtune.search.ledger import Row
from medtune.usage import lines


def brief(settings: dict[str, Any]) -> str:
    """Settings on one line: `model=medmamba_t lr=0.0012 milestones=0.33,0.5`."""
    return " ".join(f"{name}={_short(value)}" for name, value in settings.items())


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(_short(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def some(count: int, what: str) -> str:
    """`1 trial`, `3 trials`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def seconds_of(row: Row) -> float:
    """Time a trial has taken, all attempts together."""
    return float(sum(row.latest.get("seconds", {}).values()))


def saved(rows: Iterable[Row], shared: int) -> tuple[int, float]:
    """What ASHA saved: epochs that stopped trials were not trained for, and seconds at their own pace.

    `shared`: the epochs of trials that do not vary them.
    """
    left = [(row, row.epochs(shared) - row.epoch) for row in rows if row.state == "PRUNED" and row.epoch]
    return sum(epochs for _, epochs in left), sum(seconds_of(row) / row.epoch * epochs for row, epochs in left)


class Progress:
    """Shows a study from its conductor; as a context manager while trials run."""

    def __init__(self, name: str, where: str, config: StudyConfig, data: PairData) -> None:
        self.name = name
        self.where = where
        self.config = config
        self.data = data
        self.log: TextIO | None = None
        """Gets every line as well, those that the table stands for included."""
        self.console = Console(soft_wrap=True) if not Console().is_terminal else Console()
        self.started = time.monotonic()
        self.shown: dict[int, tuple[str, int]] = {}
        self.live: Live | None = None
        self.next_tick = 0.0
        self.conductor: Conductor

    def say(self, text: str) -> None:
        """One line, above the table if there is one."""
        self.console.print(Text(text))
        self._note(text)

    def _note(self, text: str) -> None:
        if self.log is not None:
            with contextlib.suppress(OSError):  # a full disk is told of by what needs it
                self.log.write(f"{text}\n")

    def begin(self, conductor: Conductor, notes: list[str]) -> None:
        """Say what will run on what, and what an earlier launch left."""
        self.conductor = conductor
        trial = self.config.trial
        done = sum(row.finished for row in conductor.rows.values())
        train = min(len(self.data.train.labels), trial.train_limit or len(self.data.train.labels))
        tested = min(len(self.data.external.labels), trial.external_limit or len(self.data.external.labels))
        self.say(f"study {self.name} in {self.where}")
        self.say(f"  {self._what()}")
        chosen = "class-balanced " if trial.train_limit and train < len(self.data.train.labels) else ""
        self.say(f"  {train} {chosen}training images of {self.data.name}")
        self.say(f"  external test: {tested} images of {self.data.external_name}")
        if trial.external_limit and tested < len(self.data.external.labels):
            self.say(f"  the external test uses a fixed stratified {tested} of {len(self.data.external.labels)} images")
        warned = (warn(self.config, conductor) for warn in (rung_warnings, search_warnings, first_warnings))
        warnings = (*self.data.warnings, *itertools.chain.from_iterable(warned))
        for warning in warnings:
            self.say(f"  warning: {warning}")
        if self.data.synthetic:
            self.say("  SYNTHETIC images: figures say nothing about any disease")
        if conductor.rows:
            self.say(f"  going on with {len(conductor.rows)} trials, {done} of them finished")
        for note in notes:
            self.say(f"  {note}")
        self.shown = {row.number: (row.state, row.epoch) for row in conductor.rows.values()}

    def _what(self) -> str:
        """How many trials of how many epochs, and what decides on them."""
        trial = self.config.trial
        epochs = sorted(set(self.conductor.epochs()))
        kind = "planned trials" if self.conductor.planned else "trials"
        of = f"{self.config.trials} {kind} of {' or '.join(map(str, epochs))} epochs at {trial.image_size} px"
        if self.conductor.planned:
            return f"{of}, none of them stopped early; weights of the epoch with the best {trial.selection}"
        rungs = [", ".join(map(str, self.config.rungs(one))) or "none" for one in epochs]
        if len(epochs) > 1:
            rungs = [f"{marks} (of {one})" for marks, one in zip(rungs, epochs, strict=True)]
        return f"{of}, rungs at epochs {' and '.join(rungs)}; search by {trial.selection}"

    def _epoch(self, row: Row) -> str:
        """`5`, or `5/100` where trials differ in epochs."""
        return f"{row.epoch}/{row.epochs(0)}" if "epochs" in (row.settings or {}) else str(row.epoch)

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        if self.console.is_terminal:
            self.live = Live(self._table(), console=self.console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self.live is not None:
            self.live.stop()
            self.live = None

    def callback(self) -> Any:
        """A Tune callback that keeps this up to date."""
        from medtune.search.scheduler import Ticker

        return Ticker(self.tick)

    def tick(self) -> None:
        """Refresh, at most twice a second, and for no more than a twentieth of the time, however many trials there are."""
        started = time.monotonic()
        if started >= self.next_tick:
            self._show()
            ended = time.monotonic()
            self.next_tick = ended + max(0.5, 19 * (ended - started))

    def _show(self) -> None:
        if self.live is not None:
            self.live.update(self._table(), refresh=True)
        for row in list(self.conductor.rows.values()):
            if self.shown.get(row.number) != (row.state, row.epoch):
                self.shown[row.number] = (row.state, row.epoch)
                (self.say if self.live is None else self._note)(self._line(row))

    def _line(self, row: Row) -> str:
        clock = duration(time.monotonic() - self.started)
        value = "" if row.value is None else f" {self.config.trial.selection} {row.value:.4f}"
        what = "starts" if row.epoch == 0 and not row.finished else f"{row.state} epoch {self._epoch(row)}{value}"
        cause = f": {row.cause}" if row.cause else ""
        settings = f"  {brief(row.settings)}" if row.settings and not row.finished and row.epoch == 0 else ""
        return f"[{clock:>6}] trial {row.number:>3} {what}{cause}{settings}"

    def best(self) -> Row | None:
        """The best trial so far by the selection metric, among those that were not stopped or lost."""
        alive = [r for r in self.conductor.rows.values() if r.value is not None and r.state in ("COMPLETE", "RUNNING")]
        sign = 1 if self.conductor.minimise else -1
        return min(alive, key=lambda r: sign * (r.value or 0.0), default=None)

    def summary(self) -> list[str]:
        """Trials by state, best so far, what ASHA saved, time left."""
        rows = list(self.conductor.rows.values())
        states = Counter(row.state for row in rows)
        states["to come"] = max(0, self.config.trials - len(rows))
        lines = ["  ".join(f"{count} {state}" for state, count in states.items() if count)]
        best = self.best()
        if best is not None and best.value is not None:
            lines.append(f"best so far: trial {best.number}, {self.config.trial.selection} {best.value:.4f}")
            lines.append(f"  {brief(best.settings or {})}")
        epochs, seconds = saved(rows, self.config.trial.epochs)
        if epochs:
            lines.append(f"stopped early: {epochs} epochs, about {duration(seconds)} of computing saved")
        left = self._time_left(rows)
        if left is not None:
            lines.append(f"time left: about {duration(left)}")
        return lines

    def _time_left(self, rows: list[Row]) -> float | None:
        ended = [seconds_of(row) for row in rows if row.finished and seconds_of(row)]
        if not ended or not self.conductor.live:
            return None
        if self.conductor.planned:
            an_epoch = sum(map(seconds_of, rows)) / max(1, sum(row.epoch for row in rows))
            return an_epoch * self._epochs_left(rows) / len(self.conductor.live)
        mean = sum(ended) / len(ended)
        running = sum(min(mean, seconds_of(row)) for row in rows if not row.finished)
        return max(0.0, (mean * (self.config.trials - len(ended)) - running) / max(1, len(self.conductor.live)))

    def _epochs_left(self, rows: list[Row]) -> int:
        """Of a plan, all of whose epochs are known."""
        done = {row.number: row.epochs(self.config.trial.epochs) if row.finished else row.epoch for row in rows}
        return sum(max(0, epochs - done.get(number, 0)) for number, epochs in enumerate(self.conductor.epochs()))

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False, expand=False)
        metric = self.config.trial.selection
        for head, width in (("trial", 5), ("state", 8), ("epoch", 5), (metric, len(metric)), ("settings", None)):
            table.add_column(head, no_wrap=True, overflow="ellipsis", min_width=width)
        rows = sorted(self.conductor.rows.values(), key=lambda r: (r.finished, -r.number))
        room = max(3, self.console.height - 9)
        for row in rows[:room]:
            value = "" if row.value is None else f"{row.value:.4f}"
            table.add_row(str(row.number), row.state, self._epoch(row), value, brief(row.settings or {}))
        lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in self.summary()]
        hidden = len(rows) - room
        note = [Text(f"... and {hidden} more: medtune trials {self.name}")] if hidden > 0 else []
        return Group(table, *note, *lines)

    def end(self, usage: dict[str, Any] | None = None) -> None:
        """The outcome in words, with what it took of the machines (`medtune.usage.read_usage`)."""
        for line in (*self.summary(), *lines(usage or {})):
            self.say(line)


def first_warnings(config: StudyConfig, conductor: Conductor) -> list[str]:
    """Say what is drawn at random in the settings to try first, as its default is no value of the space."""
    names = dict.fromkeys(name for settings in conductor.first for name in conductor.space.unnamed(settings))
    return [
        f"the settings to try first leave {name} to the searcher: its default, {getattr(config.trial, name)!r}, is outside "
        "the space. Widen the space or name it in them"
        for name in names
    ]


def search_warnings(config: StudyConfig, conductor: Conductor) -> list[str]:
    """TPE should model at least half of the trials: say so where fixed and random ones leave it less."""
    before = max(config.starts(), len(conductor.first))
    if not conductor.planned and config.trials > 1 and before > config.trials / 2:
        left = max(0, config.trials - before)
        return [
            f"TPE proposes only {left} of {config.trials} trials from results; {before} are fixed or random. "
            "Raise --trials, lower --random-starts, or leave the report's settings out with --no-report-first."
        ]
    return []


def rung_warnings(config: StudyConfig, conductor: Conductor) -> list[str]:
    """ASHA should not judge before the learning rate drops: say so where it would."""
    milestones = conductor.space.dimensions.get("milestones")
    latest = getattr(milestones, "first", (0.0, config.trial.milestones[0] if config.trial.milestones else 0.0))[1]
    for epochs in sorted(set(conductor.epochs())):
        rungs = config.rungs(epochs)
        drops = 0 < latest < 1 and config.trial.schedule == "milestones"
        drop = config.trial.replace(milestones=(latest,), epochs=epochs).milestone_epochs() if drops else ()
        if len(rungs) > 1 and drop and rungs[1] < drop[0]:
            return [
                f"ASHA's second rung (epoch {rungs[1]}) comes before the latest first milestone (epoch {drop[0]}): trials "
                "that gain when the learning rate drops may be stopped before it. Raise --first-rung or --reduction."
            ]
    return []
