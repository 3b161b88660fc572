"""A study's ledger as Optuna's dashboard sees it: live, in readable words, with pictures, and not to be written to.

The driver alone writes the ledger, so nothing is attached to it: what is shown beyond it is added on the way to the
dashboard, and pictures are drawn from a trial's predictions when somebody looks at them. A ledger in a bucket is fetched
again while somebody looks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import threading
import time
from collections.abc import Container
from typing import Any, BinaryIO

from bottle import HTTPError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from medtune import dashboard_words as words
from medtune.errors import StudyError
from medtune.pictures import PICTURES, png
from medtune.predictions import FILE
from medtune.results import SYNTHETIC, Study, driver_alive, predicted
from medtune.search.conductor import attempt_folder
from medtune.search.ledger import Row, row_of
from medtune.storage import reading
from medtune.storage.home import LEDGER

AGAIN = 10.0
"""Seconds after which a ledger in a bucket is fetched again."""
REFUSED = "medtune dashboard only shows a study: its ledger is written by the study's driver alone"
_KINDS = tuple(PICTURES)


class _LedgerToRead(JournalFileBackend):
    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise StudyError(REFUSED)


class ShownLedger(JournalStorage):
    """The storage behind the dashboard. Every attempt to write raises StudyError."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._shown: dict[int, FrozenTrial] = {}
        """Finished trials, which do not change."""
        self._lock = threading.Lock()
        self._running, self._fetched = study.running, time.monotonic()
        super().__init__(_LedgerToRead(str(study.folder / LEDGER)))

    def get_all_studies(self) -> list[FrozenStudy]:
        self._driven()  # by which a ledger in a bucket is brought here
        return [self._about(study) for study in super().get_all_studies()]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return super().get_study_user_attrs(study_id) | words.about(self.study)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return super().get_study_system_attrs(study_id) | self._system()

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._show(super().get_trial(trial_id), self._driven())

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        driven = self._driven()
        shown = [self._show(trial, driven) for trial in super().get_all_trials(study_id, deepcopy=False)]
        chosen = [trial for trial in shown if states is None or trial.state in states]
        return copy.deepcopy(chosen) if deepcopy else chosen

    def row(self, number: int) -> Row:
        """A trial as the ledger has it."""
        (study,) = super().get_all_studies()
        return row_of(super().get_trial(self.get_trial_id_from_study_id_trial_number(study._study_id, number)))

    def _driven(self) -> bool:
        """Whether somebody drives the study."""
        bucket = self.study.bucket
        if bucket is None:
            return driver_alive(self.study.folder)
        with self._lock:
            if time.monotonic() - self._fetched >= AGAIN:
                # A bucket that does not answer leaves what is shown as it is.
                with contextlib.suppress(StudyError):
                    reading.fetch_again(bucket)
                    self._running = reading.driven(bucket)
                self._fetched = time.monotonic()
            return self._running

    def _about(self, study: FrozenStudy) -> FrozenStudy:
        shown = copy.copy(study)
        shown.user_attrs = study.user_attrs | words.about(self.study)
        shown.system_attrs = study.system_attrs | self._system()
        return shown

    def _system(self) -> dict[str, Any]:
        """The study's note and the name of its value, under Optuna's and its dashboard's keys."""
        note = {"dashboard:note_ver": 1, "dashboard:note_str:0": words.note(self.study)}
        return {"study:metric_names": [self.study.selection]} | note

    def _show(self, trial: FrozenTrial, driven: bool) -> FrozenTrial:
        if trial.number in self._shown:
            return self._shown[trial.number]
        row = row_of(trial)
        shown = copy.copy(trial)
        shown._user_attrs = words.facts(row)
        shown._system_attrs = trial._system_attrs | dict(self._pictures(row))
        if row.state == "RUNNING" and not driven:
            shown.state = TrialState.WAITING  # as `medtune trials` calls what nobody trains
        if row.finished:
            self._shown[trial.number] = shown
        return shown

    def _pictures(self, row: Row) -> list[tuple[str, str]]:
        """What the dashboard is told of a trial's artifacts."""
        if row.state != "COMPLETE" or not self._predicted(row):
            return []
        found = []
        for place, kind in enumerate(_KINDS):
            name = f"{row.number}-{place}"
            about = {"artifact_id": name, "filename": f"{kind}.png", "mimetype": "image/png", "encoding": None}
            found.append((f"artifacts:{name}", json.dumps(about)))
        return found

    def _predicted(self, row: Row) -> bool:
        """Whether it left predictions; in a bucket nobody asks before somebody looks."""
        folder = attempt_folder(self.study.folder / "trials", row.number, row.attempt)
        return bool(self.study.bucket) or (folder / FILE).exists()


class Pictures:
    """Optuna's store of artifacts, filled on demand: `NUMBER-KIND` is a trial's picture."""

    def __init__(self, storage: ShownLedger) -> None:
        self._storage = storage
        self._drawn = functools.lru_cache(maxsize=64)(self._draw)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Answers with 404 where a trial has no such picture, or left no predictions to draw it from."""
        number, _, place = artifact_id.partition("-")
        if not (number.isdecimal() and place.isdecimal() and int(place) < len(_KINDS)):
            raise HTTPError(404, f"no picture {artifact_id}")
        return io.BytesIO(self._drawn(int(number), _KINDS[int(place)]))

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        raise StudyError(REFUSED)

    def remove(self, artifact_id: str) -> None:
        raise StudyError(REFUSED)

    def _draw(self, number: int, kind: str) -> bytes:
        study = self._storage.study
        found = predicted(study, self._storage.row(number))
        if not found:
            raise HTTPError(404, f"trial {number} left no predictions")
        count = next(iter(found.values())).logits.shape[1]
        classes = study.record.get("classes") or [str(label) for label in range(count)]
        mark = f" {SYNTHETIC.strip()}" if study.record["synthetic"] else ""
        return png(PICTURES[kind](found, classes, f"{study.name}, trial {number}{mark}"))
