"""The W&B sweep of a study: registered once, its runs attached to it, by the process that uploads them.

W&B's own agents tell a run its sweep before it starts. Here the sweep may come into being after the run: files are written
offline, perhaps without a key. So a run's file says nothing of it, and each upload is followed by a call that attaches the
run; the uploads themselves neither wait for the sweep nor fail with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from medtune.record import read_json, write_json
from medtune.wandb_env import Account, TrackingError, app_url, ask
from medtune.wandb_files import RunFile

FILE = "sweep.json"
AGAIN_SECONDS = 300.0
"""Until a server that refused the sweep is asked again."""

_UPSERT_SWEEP = """
mutation UpsertSweep($config: String, $entity: String, $project: String) {
  upsertSweep(input: {config: $config, entityName: $entity, projectName: $project}) {
    sweep { name project { name entity { name } } }
  }
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
        sweep = Sweep(account.url, made["project"]["entity"]["name"], made["project"]["name"], made["name"])
    except (KeyError, TypeError):
        raise TrackingError(f"{account.url} registers no sweep") from None
    write_json(study / "wandb" / FILE, asdict(sweep))
    return sweep


def attach(account: Account, sweep: Sweep, run: str) -> None:
    """Make a run one of the sweep. Raises TrackingError."""
    given = {"name": run, "entity": sweep.entity, "project": sweep.project, "sweep": sweep.id}
    if not ask(account, _ATTACH, given).get("upsertBucket"):
        raise TrackingError(f"{account.url} does not attach a run to its sweep")


class SweepKeeper:
    """Registers a study's sweep and attaches its runs, in a thread of its own, one piece of work at a time."""

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

    def tend(self, files: Sequence[RunFile], followed: Collection[str]) -> bool:
        """Go on with what is to be done, without waiting for it; whether something is.

        `followed`: runs that the server has heard of and that are still being written.
        """
        if self._thread is not None and self._thread.is_alive():
            return True
        todo = [file for file in files if self._wants(file, followed)]
        if not self.known or not todo or time.monotonic() < self._again:
            return False
        self._thread = threading.Thread(target=self._work, args=(todo,), daemon=True, name="sweep")
        self._thread.start()
        return True

    def _wants(self, file: RunFile, followed: Collection[str]) -> bool:
        if file.project != self.project or file.run in self._failed:
            return False
        shown = file.run in followed and file.run not in self._shown
        return shown or (file.uploaded and (self.sweep is None or file.sweep != self.sweep.id))

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


def unattached(study: Path, files: Sequence[RunFile], server: str) -> bool:
    """Whether runs that were uploaded are in no sweep yet."""
    if not files or configuration_of(study) is None:
        return False
    sweep = read_sweep(study, server, files[0].project)
    ours = [file for file in files if file.uploaded and file.project == files[0].project]
    return any(sweep is None or file.sweep != sweep.id for file in ours)
