"""The ledger: one row a trial in a durable Optuna study, written by the driver alone, ahead of each launch.

It is the truth about a study. Ray's own snapshot lags by seconds and is not used; what a trial's process wrote into its
folder is brought in by `Conductor.recover`. The file is Optuna's journal, so Optuna's dashboard reads it while it grows.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from medtune.config import StudyConfig
from medtune.errors import StudyError
from medtune.search.journal import DriverJournal
from medtune.search.sampler import Modelled, PartTPE
from medtune.search.space import SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)


class _KernelLock(BaseJournalFileLock):
    """A lock that dies with its holder; Optuna's own leaves a file behind on SIGKILL and then waits 30 s for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def acquire(self) -> bool:
        self.file = open(self.path, "w")  # noqa: SIM115 held until release
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self.file is not None
        self.file.close()
        self.file = None


METRICS = ("best", "external")
"""What a report has of metrics: at the best epoch so far, and of the external tests."""


@dataclass(frozen=True)
class Row:
    """One trial as the ledger has it."""

    number: int
    state: str
    """RUNNING, COMPLETE, PRUNED, FAIL or WAITING, in Optuna's words."""
    params: dict[str, Any]
    value: float | None
    """The selection metric at its best epoch so far."""
    epoch: int
    """The last epoch reported; 0: none."""
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.state in ("COMPLETE", "PRUNED", "FAIL")

    @property
    def settings(self) -> dict[str, Any] | None:
        """The searched settings; None when the driver died while it asked for them."""
        return self.attrs.get("settings")

    @property
    def attempt(self) -> int:
        """The attempt whose reports count; 0: never launched."""
        return int(self.attrs.get("attempt", 0))

    @property
    def faults(self) -> int:
        """Times its process or machine died."""
        return int(self.attrs.get("faults", 0))

    @property
    def faults_here(self) -> int:
        """Those since it last got an epoch further."""
        epoch, count = self.attrs.get("faults_at", (-1, 0))
        return int(count) if epoch == self.epoch else 0

    @property
    def errors(self) -> dict[str, str]:
        """Errors of its own that it was started again after: cause by attempt."""
        return self.attrs.get("errors", {})

    @property
    def latest(self) -> dict[str, Any]:
        """The newest report's node, seconds by attempt, metrics at the best epoch and external metrics."""
        # The metrics are many and seldom new: they are facts of their own, within `latest` in older ledgers.
        return {**self.attrs.get("latest", {}), **{part: self.attrs[part] for part in METRICS if part in self.attrs}}

    @property
    def cause(self) -> str | None:
        """Why it failed."""
        return self.attrs.get("cause")

    def epochs(self, shared: int) -> int:
        """The epochs it is trained for: its own where the study varies them, else `shared`."""
        return int((self.settings or {}).get("epochs", shared))

    def rung(self, epoch: int) -> Mapping[str, Any] | None:
        """ASHA's record of this trial at its rung of that epoch: value, whether it was kept, which rung it is."""
        return self.attrs.get(f"rung:{epoch}")


class Ledger:
    """Rows of one study. `Ledger.read` for looking, `Ledger.open` for the one driver."""

    def __init__(self, study: optuna.Study, journal: DriverJournal | None = None) -> None:
        self.study = study
        self._journal = journal
        self._modelled = None if journal is None else Modelled(study)
        self._live: dict[int, optuna.trial.Trial] = {}

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Open for looking. Raises StudyError if there is no readable ledger."""
        if not path.exists():
            raise StudyError(f"no ledger at {path}: the study was never started, or this is not a study's folder")
        storage = _readable(path, JournalFileBackend)
        if not storage.get_all_studies():
            raise StudyError(f"the ledger {path} is empty: the study was stopped before its first trial")
        return cls(optuna.load_study(study_name=None, storage=storage))

    @classmethod
    def open(cls, path: Path, name: str, direction: Literal["minimize", "maximize"]) -> Ledger:
        """Open for writing, creating it if need be. The caller holds the study's driver lock."""
        if path.exists():
            _cut_torn_tail(path)
        storage = _readable(path, DriverJournal)
        study = optuna.create_study(
            storage=storage, study_name=name, direction=direction, load_if_exists=True, sampler=None
        )
        assert isinstance(storage._backend, DriverJournal)
        return cls(study, storage._backend)

    def together(self) -> contextlib.AbstractContextManager[None]:
        """What is written inside is on disk in one write at its end; the end of a row is at once."""
        assert self._journal is not None, "the ledger was opened for looking"
        return self._journal.together()

    def rows(self) -> list[Row]:
        """All trials that were begun, by number."""
        trials = self.study.get_trials(deepcopy=False)
        return [row_of(trial) for trial in trials if trial.state != TrialState.WAITING]

    def row(self, number: int) -> Row:
        return row_of(self._frozen(number))

    def ask(self, space: SearchSpace, config: StudyConfig, first: Mapping[str, Any] | None) -> int:
        """Begin the next trial and return its number. `first`: settings to try instead of a suggestion."""
        if first is not None and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.enqueue_trial(space.encode(first))
        with self.together():
            trial = self.study.ask()
            self._live[trial.number] = trial
            self.complete_ask(trial.number, space, config)
        return trial.number

    def complete_ask(self, number: int, space: SearchSpace, config: StudyConfig) -> None:
        """Settle a row's settings; what an interrupted ask already fixed stays as it is."""
        assert self._modelled is not None, "the ledger was opened for looking"
        self.study.sampler = _sampler(config, number, self._modelled)
        settings = space.suggest(self._trial(number))
        self.note(number, settings=settings)
        self._modelled.note(self._frozen(number))

    def note(self, number: int, **attrs: Any) -> None:
        """Write facts about a running trial."""
        trial = self._trial(number)
        for key, value in attrs.items():
            trial.set_user_attr(key, value)

    def record_rung(self, number: int, epoch: int, value: float | None, kept: bool, *, index: int, order: int) -> None:
        """ASHA's decision, one write: a rung is decided or it is not.

        `index`: which rung it is, from 0; trials of other epochs have it elsewhere. `order`: how many reached it before.
        """
        self.note(number, **{f"rung:{epoch}": {"value": value, "kept": kept, "index": index, "order": order}})

    def record_epoch(self, number: int, epoch: int, value: float) -> None:
        """The selection metric at its best epoch so far, as of `epoch`. A repeated epoch keeps its first value."""
        trial = self._trial(number)
        if epoch not in trial.storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(value, step=epoch)

    def finish(self, number: int, state: str, value: float | None, cause: str | None = None) -> None:
        """End a row. PRUNED takes the last reported value as its own, as Optuna does."""
        if cause is not None:
            self.note(number, cause=cause)
        values = value if state == "COMPLETE" else None
        self.study.tell(number, values, state=TrialState[state])
        self._live.pop(number, None)
        if self._journal is not None and self._modelled is not None:
            self._modelled.note(self._frozen(number))
            self._journal.flush()

    def _trial(self, number: int) -> optuna.trial.Trial:
        if number not in self._live:
            self._live[number] = optuna.trial.Trial(self.study, self._frozen(number)._trial_id)
        return self._live[number]

    def _frozen(self, number: int) -> FrozenTrial:
        storage = self.study._storage
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number))


def row_of(trial: FrozenTrial) -> Row:
    """A trial of Optuna's as a row."""
    epoch = trial.last_step or 0
    value = trial.value if trial.state == TrialState.COMPLETE else trial.intermediate_values.get(epoch)
    return Row(trial.number, trial.state.name, trial.params, value, epoch, trial.user_attrs)


def _readable(path: Path, journal: type[JournalFileBackend]) -> JournalStorage:
    try:
        return JournalStorage(journal(str(path), lock_obj=_KernelLock(path.with_suffix(".lock"))))
    except (ValueError, KeyError) as error:
        raise StudyError(
            f"the ledger {path} is damaged ({type(error).__name__}: {error}). What trials wrote is still under "
            f"{path.parent / 'trials'}; restore the file from a copy, or start another study with --new"
        ) from None


def _cut_torn_tail(path: Path) -> None:
    """Drop a last line that a killed driver left unfinished; the next append would run into it."""
    with open(path, "rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)
            os.fsync(file.fileno())


def _sampler(config: StudyConfig, number: int, modelled: Modelled) -> optuna.samplers.BaseSampler:
    """TPE with random numbers of its own for each trial: a resumed study goes on as an uninterrupted one would."""
    seed = int(np.random.SeedSequence([config.trial.seed, number]).generate_state(1)[0])
    return PartTPE(modelled, seed=seed, random_starts=config.starts())
