"""Decides what runs next, accepts or refuses what trials report, and keeps the ledger. Knows nothing of Ray.

A trial goes through here only: `next_launch` -> `report` ... -> finished, or `lost` -> `next_launch` again. All that is
needed to go on after the driver was killed is in the ledger and in the trials' folders; `recover` reads it back.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from medtune.claim import claim
from medtune.config import StudyConfig, TrialConfig
from medtune.placement import Place
from medtune.search.alike import FirstFailures
from medtune.search.asha import Rung
from medtune.search.ledger import METRICS, Ledger, Row
from medtune.search.space import SearchSpace
from medtune.tracking import read_epochs, read_final, read_outcome

AHEAD = 2
"""Trials that are asked for, at most, for each place that is free and suits none that wait."""

Status = Literal["running", "complete", "fail", "out_of_memory"]


@dataclass(frozen=True)
class Launch:
    """One attempt to be started."""

    number: int
    attempt: int
    config: TrialConfig
    micro_batch: int | None = None
    """Images a device computes at once at most, when an earlier attempt found that more do not fit."""
    place: Place | None = None
    """Where it runs; None: nobody places the study's trials."""

    def folder(self, trials: Path) -> Path:
        """Where this attempt writes, and nothing else does."""
        return attempt_folder(trials, self.number, self.attempt)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial's process tells the driver after an epoch, or at its end."""

    number: int
    attempt: int
    status: Status
    epoch: int = 0
    value: float | None = None
    """Selection metric at the best epoch so far."""
    best: dict[str, Any] = field(default_factory=dict)
    """Train and val metrics at the best epoch so far."""
    external: dict[str, Any] = field(default_factory=dict)
    """External and own test metrics, when this epoch was tested."""
    cause: str | None = None
    repeats: bool = False
    """Whether a failure would come again if the trial were started again."""
    node: str | None = None
    seconds: float = 0.0
    """Time this attempt has taken so far."""
    micro_batch: int | None = None
    """Images a device computes at once; after `out_of_memory`, to be computed at once by the next attempt."""
    leaving: bool = False
    """Whether its machine is about to be taken away."""
    memory: dict[str, Any] | None = None
    """What a process alone on its GPU has taken of it (`medtune.memory.used`)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def configured(base: TrialConfig, number: int, settings: Mapping[str, Any]) -> TrialConfig:
    """What a trial is trained with; its seed is the study's and its number, unless its settings name one."""
    return base.replace(**{"seed": base.seed + number, **settings})


def trial_folder(trials: Path, number: int) -> Path:
    """A trial's folder in the study's `trials` folder."""
    return trials / f"{number:04d}"


def attempt_folder(trials: Path, number: int, attempt: int) -> Path:
    """An attempt's folder."""
    return trial_folder(trials, number) / f"attempt-{attempt}"


class Placing(Protocol):
    """Finds the places where trials run (`medtune.placer.Placer`)."""

    def place(self, number: int, config: TrialConfig) -> Place | None:
        """Where a trial may start now; None: nowhere yet."""

    def moves(self, launch: Launch, report: Report) -> bool:
        """Take in a report; whether the trial should go on elsewhere, as it is, in another attempt."""


class Conductor:
    """The study's state machine; see the module's docstring."""

    def __init__(
        self,
        ledger: Ledger,
        config: StudyConfig,
        space: SearchSpace,
        trials: Path,
        first: Sequence[Mapping[str, Any]] = (),
        planned: bool = False,
        slots: Callable[[], int] = lambda: 1,
        on_finish: Callable[[Row], None] = lambda row: None,
        before_launch: Callable[[int], None] = lambda number: None,
        before_hearing: Callable[[int, int], None] = lambda number, attempt: None,
    ) -> None:
        """`first`: settings to try before the searcher proposes any; when `planned`, they are all there is.

        `slots`: how many trials may run at a time now. `before_launch`: sees to it that the ledger is safe.
        `before_hearing`: sees to it that what an attempt wrote is in its folder.
        """
        self.ledger = ledger
        self.config = config
        self.space = space
        self.trials = trials
        self.first = first
        self.planned = planned
        self.slots = slots
        self.on_finish = on_finish
        self.placing: Placing | None = None
        self.before_launch = before_launch
        self.before_hearing = before_hearing
        self.rows: dict[int, Row] = {row.number: row for row in ledger.rows()}
        self.live: dict[int, Launch] = {}
        self.waiting: list[int] = []
        self.minimise = minimised(config.trial.selection)
        self.hopeless: str | None = None
        """Why no more trials should be tried in this launch."""
        self._first_failures = FirstFailures(config.alike_failures)
        self._leaving: set[tuple[int, int]] = set()
        """Number and attempt of what ran on a machine that had given notice."""
        self._at_rung: dict[int, Rung] = {}
        """All trials that reached a rung, each at its own epoch, by the rung's index."""
        for row in self.rows.values():
            for index, epoch in enumerate(self._rungs(row)):
                if (record := row.rung(epoch)) is not None:
                    self._rung(index).add(record["value"])
        self.ranking = [standing for row in self.rows.values() if (standing := self._standing(row)) is not None]
        """(value, number) of the trials that were trained to the end, the best first, less being better."""
        self.ranking.sort()

    def recover(self) -> list[str]:
        """Bring in what the last driver did not hear of; what is still unfinished will be launched again.

        Returns one line for each trial that was left unfinished.
        """
        notes = []
        for row in list(self.rows.values()):
            if row.finished:
                if read_outcome(trial_folder(self.trials, row.number)) is None:
                    self.on_finish(row)  # the driver died between ending the row and tidying up
                continue
            if row.settings is None:
                self.ledger.complete_ask(row.number, self.space, self.config)
            self._hear_folder(row)
            self._refresh(row.number)
            row = self.rows[row.number]
            if row.finished:
                notes.append(f"trial {row.number}: {row.state}, as its folder showed")
            else:
                self.waiting.append(row.number)
                notes.append(f"trial {row.number}: goes on after epoch {row.epoch} of {self._epochs(row)}")
        # What the last launch came to is no reason to stop this one.
        self.hopeless, self._first_failures = None, FirstFailures(self.config.alike_failures)
        return notes

    def _hear_folder(self, row: Row) -> None:
        """Feed the reports that the current attempt wrote down and the driver did not take in."""
        if row.attempt == 0 or str(row.attempt) in row.errors:
            return
        self.before_hearing(row.number, row.attempt)
        self.live[row.number] = self._launch(row.number, row.attempt)
        for epoch in self._rungs(row):
            rung = row.rung(epoch)
            if rung is not None and not rung["kept"]:
                self._finish(row.number, "PRUNED", rung["value"])
                return
        folder = attempt_folder(self.trials, row.number, row.attempt)
        reports = [line["report"] for line in read_epochs(folder) if "report" in line]
        final = read_final(folder)
        if final is not None:
            reports.append(final)
        for values in reports:
            report = Report(**values)
            # The newest epoch again: the driver may have died between writing it down and deciding its rung.
            if report.status != "running" or report.epoch >= row.epoch:
                self.report(report)
        self.live.pop(row.number, None)
        if row.number in self.waiting:  # to be tried again: the caller sees to that
            self.waiting.remove(row.number)

    def next_launch(self) -> Launch | Literal["later", "done"]:
        """What to start now. `later`: nothing until something is reported; `done`: every trial has ended."""
        if self.hopeless:
            return "done"
        slots = self.slots()
        if len(self.live) >= slots:
            return "later"
        for number in list(self.waiting):
            place = self._place(number)
            if place is None and self.placing is not None:
                continue
            self.waiting.remove(number)
            # Its last process may have ended after all, behind the driver's back.
            self._hear_folder(self.rows[number])
            self._refresh(number)
            if not self.rows[number].finished:
                return self._begin(number, place)
        # What waits fits none of the free places: others may. Few, as the searcher proposes them on what is known today.
        while len(self.rows) < self.config.trials and len(self.waiting) < AHEAD * (slots - len(self.live)):
            count = len(self.rows)
            number = self.ledger.ask(self.space, self.config, self.first[count] if count < len(self.first) else None)
            self._refresh(number)
            place = self._place(number)
            if place is not None or self.placing is None:
                return self._begin(number, place)
            self.waiting.append(number)
        unfinished = self.live or self.waiting or len(self.rows) < self.config.trials
        return "later" if unfinished else "done"

    def to_come(self) -> int:
        """Trials that were not begun yet."""
        return max(0, self.config.trials - len(self.rows))

    def _place(self, number: int) -> Place | None:
        return None if self.placing is None else self.placing.place(number, self.trial_config(number))

    def trial_config(self, number: int) -> TrialConfig:
        """What a trial is trained with."""
        settings = self.rows[number].settings
        assert settings is not None
        return configured(self.config.trial, number, settings)

    def take_back(self, launch: Launch) -> None:
        """The attempt was not started, and will not be: its place is gone. It is launched again where there is one."""
        if self.live.get(launch.number) == launch:
            self._again(launch.number)

    def _begin(self, number: int, place: Place | None) -> Launch:
        self._refresh(number)
        attempt = self.rows[number].attempt + 1
        self.ledger.note(number, attempt=attempt)
        self._refresh(number)
        claim(trial_folder(self.trials, number), attempt)
        self.before_launch(number)
        launch = replace(self._launch(number, attempt), place=place)
        self.live[number] = launch
        return launch

    def _launch(self, number: int, attempt: int) -> Launch:
        row = self.ledger.row(number)
        assert row.settings is not None
        config = configured(self.config.trial, number, row.settings)
        return Launch(number, attempt, config, row.attrs.get("micro_batch"))

    def epochs(self) -> list[int]:
        """The epochs of the study's trials: of each, in order, when planned, else each number that the space has."""
        if self.planned:
            return [configured(self.config.trial, 0, settings).epochs for settings in self.first[: self.config.trials]]
        return self.space.values("epochs", self.config.trial)

    def _epochs(self, row: Row) -> int:
        return row.epochs(self.config.trial.epochs)

    def _rungs(self, row: Row) -> tuple[int, ...]:
        return self.config.rungs(self._epochs(row))

    def _rung(self, index: int) -> Rung:
        return self._at_rung.setdefault(index, Rung(self.config.reduction, minimise=self.minimise))

    def _standing(self, row: Row) -> tuple[float, int] | None:
        """Where a trial stands in `ranking`; None while it was not trained to the end."""
        if row.state != "COMPLETE" or row.value is None:
            return None
        return row.value if self.minimise else -row.value, row.number

    def report(self, report: Report) -> bool:
        """Take in a report; returns whether the trial goes on. Reports of an attempt that is not current are ignored."""
        launch = self.live.get(report.number)
        if launch is None or launch.attempt != report.attempt:
            return False
        with self.ledger.together():
            return self._take_in(report)

    def _take_in(self, report: Report) -> bool:
        number = report.number
        if report.leaving:
            self._leaving.add((number, report.attempt))
        self.ledger.note(number, **_news(self.rows[number], report))
        moves = self.placing is not None and self.placing.moves(self.live[number], report)
        if report.status == "fail":
            return self._fail(report)
        if report.status == "out_of_memory":
            # No fault: it goes on at once in another attempt, from its last checkpoint.
            return self._again(number, **({} if moves else {"micro_batch": report.micro_batch}))
        if report.value is not None:
            self.ledger.record_epoch(number, report.epoch, report.value)
        if report.status == "complete":
            if report.value is None:
                selection = self.config.trial.selection
                return self._finish(number, "FAIL", None, f"{selection} is undefined in every epoch")
            return self._finish(number, "COMPLETE", report.value)
        self._refresh(number)
        rungs = self._rungs(self.rows[number])
        if report.epoch in rungs and self.rows[number].rung(report.epoch) is None:
            index = rungs.index(report.epoch)
            rung = self._rung(index)
            kept = rung.keeps(report.value)
            self.ledger.record_rung(number, report.epoch, report.value, kept, index=index, order=rung.reached)
            rung.add(report.value)
            if not kept:
                return self._finish(number, "PRUNED", report.value)
            self._refresh(number)
        if moves:
            self._again(number)
        return not moves

    def _fail(self, report: Report) -> bool:
        """The trial's own error: it is tried again within its budget, from its last checkpoint."""
        number = report.number
        errors = self.rows[number].errors | {str(report.attempt): str(report.cause)}
        if report.repeats or len(errors) > self.config.retries:
            return self._finish(number, "FAIL", None, report.cause)
        return self._again(number, errors=errors)

    def _again(self, number: int, **attrs: Any) -> bool:
        """Launch a trial again before any other, with these facts about it."""
        self.ledger.note(number, **attrs)
        self.live.pop(number)
        self._refresh(number)
        self.waiting.insert(0, number)
        return False

    def lost(self, launch: Launch, cause: str, *, announced: bool = False) -> None:
        """The attempt's process or machine died. The trial is started again, within a budget of its own.

        `announced`: the machine was taken away with notice, which is charged to no budget; a report may have said so too.
        """
        number = launch.number
        if self.live.get(number) != launch:
            return
        self.live.pop(number)
        row = self.rows[number]
        here = row.faults_here + (not (announced or (number, launch.attempt) in self._leaving))
        self.ledger.note(number, faults=row.faults + 1, faults_at=[row.epoch, here])
        self._refresh(number)
        if here > self.config.machine_faults:
            at = f" without getting past epoch {row.epoch}" if row.epoch else ""
            self._finish(number, "FAIL", None, f"its process or machine died {here} times{at}, last: {cause}", own=False)
        else:
            self.waiting.append(number)

    def _finish(
        self, number: int, state: str, value: float | None, cause: str | None = None, *, own: bool = True
    ) -> bool:
        """`own`: the end says something of the trial, not of a machine."""
        self.ledger.finish(number, state, value, cause)
        self.live.pop(number, None)
        self._refresh(number)
        if (standing := self._standing(self.rows[number])) is not None:
            bisect.insort(self.ranking, standing)
        self.on_finish(self.rows[number])
        if own:
            self.hopeless = self.hopeless or self._first_failures.end(cause if state == "FAIL" else None)
        return False

    def _refresh(self, number: int) -> None:
        self.rows[number] = self.ledger.row(number)


def _news(row: Row, report: Report) -> dict[str, Any]:
    """What a report adds to what is known of a trial besides its value."""
    latest = row.latest
    news = {
        "latest": {
            "node": report.node or latest.get("node"),
            "seconds": {**latest.get("seconds", {}), str(report.attempt): round(report.seconds, 3)},
            "micro_batch": report.micro_batch or latest.get("micro_batch"),
        }
    }
    metrics = {part: getattr(report, part) or latest.get(part) for part in METRICS}
    return news | {part: values for part, values in metrics.items() if values and values != row.attrs.get(part)}


def minimised(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.rsplit("/", 1)[-1] == "loss"
