"""What a page is made from: a study as it was read, when its trials began and ended, its choice and its audit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial

from medtune.audit import verdict_of
from medtune.choose import read_choice
from medtune.progress import some
from medtune.results import GROUPS, Study, metric, rank
from medtune.search.conductor import minimised
from medtune.search.ledger import Ledger, Row
from medtune.storage.home import LEDGER


@dataclass(frozen=True)
class Source:
    """A study, and what else the page tells of it."""

    study: Study
    trials: Mapping[int, FrozenTrial]
    """Optuna's own trials by number: with their times and the ranges they were drawn from."""
    choice: Mapping[str, Any] | None
    """choice.json; None while `medtune choose` has not run."""
    audit: Mapping[str, Any] | None
    """audit.json; None while the data were not audited."""
    now: float = field(default_factory=time.time)

    @property
    def selection(self) -> str:
        return self.study.selection

    @property
    def minimise(self) -> bool:
        return self.minimises(self.selection)

    @property
    def complete(self) -> list[Row]:
        """Trials trained to the end, the best on val first."""
        return rank(self.study, self.selection)

    @property
    def external(self) -> str:
        """The name that external figures go by: `cpn` where the set was verified, else `external`."""
        return "cpn" if self.study.record["verified_cpn"] else "external"

    @property
    def external_name(self) -> str:
        """The external set in words."""
        record = self.study.record
        return "CPN X-ray (verified)" if record["verified_cpn"] else str(record["data"]["external_name"])

    def split(self, name: str) -> str:
        """A split in words; the external set goes by its name in the record."""
        own = name.replace("external", self.external, 1)
        return GROUPS.get(own, own)

    @property
    def running(self) -> bool:
        return self.study.running

    def epochs(self, row: Row) -> int:
        """The epochs that a trial is trained for."""
        return row.epochs(self.study.record["settings"]["epochs"])

    def began(self, row: Row) -> float | None:
        """When a trial began, in seconds since 1970."""
        trial = self.trials.get(row.number)
        return trial.datetime_start.timestamp() if trial and trial.datetime_start else None

    def ended(self, row: Row) -> float | None:
        """When it ended."""
        trial = self.trials.get(row.number)
        return trial.datetime_complete.timestamp() if trial and trial.datetime_complete else None

    def numbers(self, rows: Sequence[Row], *names: str) -> list[tuple[float | None, ...]]:
        """These figures of each trial."""
        return [tuple(metric(row, name) for name in names) for row in rows]

    @staticmethod
    def minimises(name: str) -> bool:
        """Whether less of a figure is better."""
        return minimised(name)

    def counts(self) -> str:
        """`12 trials: 5 COMPLETE, 7 PRUNED`."""
        states: dict[str, int] = {}
        for row in self.study.rows:
            states[self.study.state(row)] = states.get(self.study.state(row), 0) + 1
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        return some(len(self.study.rows), "trial") + (f": {told}" if told else "")


def read_source(study: Study) -> Source:
    """A study with what lies beside it."""
    journal = study.folder / LEDGER
    there = journal.exists() and journal.stat().st_size
    trials = Ledger.read(journal).study.get_trials(deepcopy=False) if there else []
    by_number = {trial.number: trial for trial in trials}
    return Source(study, by_number, read_choice(study), verdict_of(study))
