"""The W&B sweep of a study: registered once, its runs attached to it, by the process that uploads them.

W&B's own agents tell a run its sweep before it starts. Here the sweep may come into being after the run: files are written
offline, perhaps without a key. So a run's file says nothing of it, and each upload is followed by a call that attaches the
run; the uploads themselves neither wait for the sweep nor fail with it. When the study has ended and all its runs are there,
the sweep is finished, as `wandb sweep --stop` does it; trials that are added later set it running again (`--resume`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from medtune.record import read_json, write_json
from medtune.wandb_env import Account, TrackingError, app_url, ask
from medtune.wandb_files import RunFile

FILE = "sweep.json"
OVER = "over.json"
"""Whether the study has as many trials as were asked for, all ended."""
AGAIN_SECONDS = 300.0
"""Until a server that refused the sweep is asked again."""

_UPSERT_SWEEP = """
mutation UpsertSweep($config: String, $entity: String, $project: String) {
  upsertSweep(input: {config: $config, entityName: $entity, projectName: $project}) {
    sweep { id name project { name entity { name } } }
  }
}"""
_SET_STATE = """
mutation UpsertSweepState($id: ID, $state: String, $entity: String, $project: String) {
  upsertSweep(input: {id: $id, state: $state, entityName: $entity, projectName: $project}) { sweep { name } }
}"""
_ATTACH = """
mutation AttachRun($name: String, $entity: String, $project: String, $sweep: String) {
  upsertBucket(input: {name: $name, entityName: $entity, modelName: $project, sweep: $sweep}) { bucket { id } }
}"""


@dataclass(frozen=True)
class Sweep:
    """A registered sweep."""

    server: str
    entity: str
    project: str
    id: str
    node: str = ""
    """The server's own name for it, which its state is set by."""
    finished: bool = False

    @property
    def url(self) -> str:
        """Its page."""
        return f"{app_url(self.server)}/{quote(self.entity)}/{quote(self.project)}/sweeps/{quote(self.id)}"


def configuration(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sweep's configuration, from study.json; None for a study begun by a medtune that wrote no words for it."""
    from medtune.wandb_space import planned

    plan = record.get("planned")
    space = planned(record["first"]) if plan else record.get("parameters")
    if space is None:
        return None
    selection = record["selection"]
    goal = "minimize" if selection.rsplit("/", 1)[-1] == "loss" else "maximize"
    return {
        "name": record["name"],
        "description": f"medtune study {record['id']}: trials are run by Ray Tune, not by W&B's agents",
        "method": "grid" if plan else "custom",
        "metric": {"name": f"best/{selection}", "goal": goal},
        "parameters": space,
        # W&B proposes nothing: the study's driver does.
        "controller": {"type": "local"},
    }


def read_sweep(study: Path, server: str, project: str) -> Sweep | None:
    """The sweep that was registered for the study in this project of this server."""
    found = read_json(study / "wandb" / FILE)
    if found is None or (found["server"], found["project"]) != (server, project):
        return None
    return Sweep(**found)


def register(account: Account, study: Path, project: str, entity: str | None) -> Sweep:
    """The study's sweep, created where there is none yet. Raises TrackingError where the server does not give one."""
    if (found := read_sweep(study, account.url, project)) is not None:
        return found
    config = configuration_of(study)
    assert config is not None, "a study without words for its sweep is not registered"
    given = {"config": yaml.safe_dump(config, sort_keys=False), "entity": entity, "project": project}
    answer = ask(account, _UPSERT_SWEEP, given)
    try:
        made = answer["upsertSweep"]["sweep"]
        entity, project = made["project"]["entity"]["name"], made["project"]["name"]
        sweep = Sweep(account.url, entity, project, made["name"], made.get("id", ""))
    except (KeyError, TypeError):
        raise TrackingError(f"{account.url} registers no sweep") from None
    write_json(study / "wandb" / FILE, asdict(sweep))
    return sweep


def set_finished(account: Account, study: Path, sweep: Sweep, finished: bool) -> Sweep:
    """Say that the sweep is finished, or runs again; returns it as it then is. Raises TrackingError."""
    state = "FINISHED" if finished else "RUNNING"
    given = {"id": sweep.node, "state": state, "entity": sweep.entity, "project": sweep.project}
    if not ask(account, _SET_STATE, given).get("upsertSweep"):
        raise TrackingError(f"{account.url} does not set its sweep {state}")
    sweep = replace(sweep, finished=finished)
    write_json(study / "wandb" / FILE, asdict(sweep))
    return sweep


def note_over(study: Path, over: bool) -> None:
    """Leave word of whether the study has ended, for whoever uploads its runs."""
    folder = study / "wandb"
    if over or (folder / OVER).exists():
        with contextlib.suppress(OSError):  # a page of W&B's is no reason for a study to fail
            folder.mkdir(exist_ok=True)
            write_json(folder / OVER, {"over": over})


def _open(study: Path, sweep: Sweep) -> bool:
    """Whether the sweep is still to be finished."""
    over = (read_json(study / "wandb" / OVER) or {}).get("over", False)
    return bool(over and sweep.node and not sweep.finished)


def attach(account: Account, sweep: Sweep, run: str) -> None:
    """Make a run one of the sweep. Raises TrackingError."""
    given = {"name": run, "entity": sweep.entity, "project": sweep.project, "sweep": sweep.id}
    if not ask(account, _ATTACH, given).get("upsertBucket"):
        raise TrackingError(f"{account.url} does not attach a run to its sweep")


class SweepKeeper:
    """Registers a study's sweep, attaches its runs and finishes it, in a thread of its own, one piece of work at a time."""

    def __init__(
        self, account: Account, study: Path, project: str, entity: str | None, emit: Callable[..., None]
    ) -> None:
        self.account = account
        self.study = study
        self.project = project
        self.entity = entity
        self.emit = emit
        self.sweep: Sweep | None = None
        self.known = configuration_of(study) is not None
        self._thread: threading.Thread | None = None
        self._failed: set[str] = set()
        self._shown: set[str] = set()
        self._again = 0.0
        self._left_open = False

    def tend(self, files: Sequence[RunFile], followed: Collection[str]) -> bool:
        """Go on with what is to be done, without waiting for it; whether something is.

        `followed`: runs that the server has heard of and that are still being written.
        """
        if self._thread is not None and self._thread.is_alive():
            return True
        todo = [file for file in files if self._wants(file, followed)]
        if not self.known or not (todo or self._closes(files)) or time.monotonic() < self._again:
            return False
        self._thread = threading.Thread(target=self._work, args=(todo,), daemon=True, name="sweep")
        self._thread.start()
        return True

    def _wants(self, file: RunFile, followed: Collection[str]) -> bool:
        if file.project != self.project or file.run in self._failed:
            return False
        shown = file.run in followed and file.run not in self._shown
        return shown or (file.uploaded and (self.sweep is None or file.sweep != self.sweep.id))

    def _closes(self, files: Sequence[RunFile]) -> bool:
        if self.sweep is None or self._left_open or not _open(self.study, self.sweep):
            return False
        return all(file.uploaded for file in files if file.project == self.project)

    def _set_finished(self, finished: bool) -> None:
        assert self.sweep is not None
        try:
            self.sweep = set_finished(self.account, self.study, self.sweep, finished)
        except (TrackingError, OSError) as error:
            self._left_open = True
            self.emit("sweep left open", why=str(error))

    def _work(self, files: Sequence[RunFile]) -> None:
        try:
            if self.sweep is None:
                self.sweep = register(self.account, self.study, self.project, self.entity)
                self.emit("sweep", url=self.sweep.url)
                return
        except (TrackingError, OSError) as error:
            self._again = time.monotonic() + AGAIN_SECONDS
            self.emit("no sweep", why=str(error))
            return
        if not files:
            return self._set_finished(True)
        if self.sweep.finished:
            self._set_finished(False)
        for file in files:
            try:
                attach(self.account, self.sweep, file.run)
                self._shown.add(file.run)
                if file.uploaded:
                    file.mark_attached(self.sweep.id)
            except (TrackingError, OSError) as error:
                self._failed.add(file.run)
                self.emit("no sweep", why=str(error))


def configuration_of(study: Path) -> dict[str, Any] | None:
    """`configuration` of the study in a folder; None where no study is."""
    record = read_json(study / "study.json")
    return configuration(record) if record else None


def untended(study: Path, files: Sequence[RunFile], server: str) -> bool:
    """Whether runs that were uploaded are in no sweep yet, or the sweep of a study that has ended is not finished."""
    if not files or configuration_of(study) is None:
        return False
    sweep = read_sweep(study, server, files[0].project)
    ours = [file for file in files if file.uploaded and file.project == files[0].project]
    return any(sweep is None or file.sweep != sweep.id for file in ours) or (sweep is not None and _open(study, sweep))
