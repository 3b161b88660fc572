"""Uploads a study's W&B runs: beside it while it runs (`Uploader`), or later (`sync`, which is `medtune sync STUDY`).

The work is done by a process of its own (`medtune.wandb_engine`), so that whatever the server does, and whatever wandb
does about it, ends with a kill at the latest. The study's own processes never wait for it but a set time at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from medtune.config import WandbMode
from medtune.wandb_env import (
    Account,
    KeyRefused,
    ServerUnreachable,
    TrackingError,
    base_url,
    clean_environment,
    find_account,
    how_to_log_in,
    user_says_offline,
)
from medtune.wandb_files import run_files
from medtune.wandb_sweep import untended

SILENCE_SECONDS = 300.0
"""`sync` gives up on its process after this long without a word from it: a run may take 180 s."""

Say = Callable[[str], None]


@dataclass
class SyncReport:
    """What became of the runs of the study in folder `study`."""

    study: str
    uploaded: list[int] = field(default_factory=list)
    """Numbers of the trials whose runs were uploaded now."""
    left: list[str] = field(default_factory=list)
    """Runs that the server does not have, or not whole."""
    running: list[str] = field(default_factory=list)
    """Runs that are still being written."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why, for those of `left` that were tried."""
    sweep: str | None = None
    """The address of the study's sweep."""
    no_sweep: str | None = None
    """Why there is none, or not all runs are in it."""
    left_open: str | None = None
    """Why it is not finished, though the study is over."""
    problem: str | None = None
    """What stood in the way of all of them."""

    @property
    def ok(self) -> bool:
        """Whether the server has all runs that have ended."""
        return not self.left and not self.problem

    def describe(self) -> str:
        """For the user: what is done, what is not, why, and how to go on."""
        lines = [f"W&B: {_runs(len(self.uploaded))} uploaded" if self.uploaded else "W&B: nothing was uploaded"]
        if self.ok and not self.uploaded and not self.running:
            lines = ["W&B: all runs were uploaded before"]
        if self.running:
            lines.append(f"  {_runs(len(self.running))} still being written: left for later")
        if self.sweep:
            lines.append(f"  the study's sweep: {self.sweep}")
        if self.no_sweep:
            lines.append(f"  not all runs are in the study's sweep, which changes nothing in them: {self.no_sweep}")
        if self.left_open:
            lines.append(f"  its page still says that it runs: {self.left_open}")
        if self.problem:
            lines.append(f"  {self.problem}")
        lines += [f"  {run}: {why}" for run, why in sorted(self.failed.items()) if run in self.left]
        if self.left:
            lines.append(f"  {_runs(len(self.left))} left, safe on disk: `medtune sync {self.study}` uploads them")
        return "\n".join(lines)


def sync(study_folder: Path, say: Say = print, where: str | None = None) -> SyncReport:
    """Upload every run of the study that the server does not have as it is; what is there already is not sent again.

    `where`: what the user calls the study's place, if that is not its folder.

    Takes as long as the uploads do, each of which is bounded; three failures in a row end it.
    Raises TrackingError without a key, where the server takes nothing, or where another process uploads these runs.
    """
    study_folder = study_folder.resolve()
    account = find_account()
    if account is None:
        raise TrackingError(f"no W&B key for {base_url()}. {how_to_log_in()} Then `medtune sync {where or study_folder}`.")
    files = run_files(study_folder)
    if not files:
        raise TrackingError(f"no W&B runs in {study_folder / 'wandb'}: the study was run with --wandb off")
    report = SyncReport(where or str(study_folder))
    todo = sum(not file.uploaded for file in files)
    if not todo and not untended(study_folder, files, account.url):
        return report
    if todo:
        say(f"W&B: {_runs(todo)} to upload to {account.url}")
    engine = _Engine(study_folder, account, files[0].project, live=False)
    while (event := engine.next_event(SILENCE_SECONDS)) is not None:
        _take(event, report)
        if event["event"] == "uploaded":
            say(f"  trial {event['number']}: uploaded ({len(report.uploaded)} of {todo})")
        elif event["event"] == "failed":
            say(f"  trial {event['number']}: failed: {event['why']}")
        elif event["event"] in ("refused", "busy"):
            engine.kill()
            raise (KeyRefused if event["event"] == "refused" else TrackingError)(report.problem)
        elif event["event"] == "unreachable":
            engine.kill()
            raise ServerUnreachable(f"{report.problem}. Nothing is lost: try `medtune sync {report.study}` again later.")
        elif event["event"] == "end":
            break
    else:
        report.problem = report.problem or "the uploading process ended without a word"
        report.left = [file.run for file in run_files(study_folder) if file.quiet and not file.uploaded]
    engine.kill()
    return report


class Uploader:
    """Context manager for the driver: uploads the study's runs as they are written, in a process beside it.

    Nothing is started, and nothing is contacted, unless `mode` is "auto" and the user has a key. It never raises, and
    dies with the driver.
    """

    def __init__(
        self,
        study_folder: Path,
        mode: WandbMode = "auto",
        say: Say = print,
        where: str | None = None,
        project: str = "medtune",
    ) -> None:
        """`project`: that of the sweep, as of the runs. `where`: as in `sync`.

        `say` hears, from another thread, one line for each new kind of problem.
        """
        self.study = study_folder.resolve()
        self.mode = mode
        self.say = say
        self.project = project
        self.report = SyncReport(where or str(self.study))
        self.reason = ""
        """Why nothing is uploaded, if so."""
        self._engine: _Engine | None = None
        self._ended = threading.Event()
        self._told = False

    def start(self) -> None:
        """Start the process, or say why not in `reason`."""
        account = find_account() if self.mode == "auto" else None
        if self.mode == "off":
            self.reason = "W&B is off"
        elif self.mode == "offline" or user_says_offline():
            self.reason = f"W&B runs are kept offline; `medtune sync {self.report.study}` uploads them"
        elif account is None:
            self.reason = f"no W&B key: runs are kept offline; `medtune sync {self.report.study}` uploads them later"
        else:
            try:
                (self.study / "wandb").mkdir(parents=True, exist_ok=True)
                self._engine = _Engine(self.study, account, self.project, live=True)
                threading.Thread(target=self._listen, daemon=True, name="wandb-uploader").start()
            except OSError as error:
                self.reason = f"W&B runs are kept offline: the uploader did not start ({error})"

    @property
    def running(self) -> bool:
        """Whether runs are being uploaded."""
        return self._engine is not None and not self._ended.is_set()

    def describe(self) -> str:
        """One line for the start of a study."""
        return self.reason or f"W&B runs are uploaded to {base_url()}"

    def stop(self, timeout: float = 20.0) -> SyncReport:
        """Let what has ended be uploaded, for `timeout` seconds at most, and end the process. Call it once Ray is down.

        Where the server fails, or nothing is left, it returns at once.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            return self.report
        started = time.monotonic()
        # The process counts from when it reads this: a second is for its way out.
        engine.send(f"stop {max(0.1, timeout - 1.5):.1f}")
        self._ended.wait(timeout)
        engine.kill()
        self._ended.wait(max(0.0, started + timeout - time.monotonic()))
        if not self._told:
            self.report.left = [file.run for file in run_files(self.study) if not file.uploaded]
        return self.report

    def __enter__(self) -> Uploader:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _listen(self) -> None:
        engine = self._engine
        assert engine is not None
        heard: set[str] = set()
        while (event := engine.next_event(None)) is not None:
            _take(event, self.report)
            kind = event["event"]
            if kind in ("refused", "unreachable", "busy", "broken"):
                self.say(f"W&B: {self.report.problem}; the study goes on, its runs are kept on disk")
            elif kind == "sweep":
                self.say(f"W&B: the study's sweep is at {event['url']}")
            elif kind == "failed" and event["why"] not in heard:
                heard.add(event["why"])
                self.say(f"W&B: trial {event['number']} was not uploaded: {event['why']}; it is tried again")
            elif kind == "end":
                self._told = True
                break
        if not self._told and self._engine is not None:
            self.say(f"W&B: the uploader ended (see {self.study / 'wandb' / 'upload.log'}); runs are kept on disk")
        self._ended.set()


class _Engine:
    """The uploading process, seen from its parent."""

    def __init__(self, study: Path, account: Account, project: str, live: bool) -> None:
        with (study / "wandb" / "upload.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "medtune.wandb_engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=clean_environment(os.environ) | account.environment,
                # Ctrl-C is for the driver, which then stops this in its own way.
                start_new_session=True,
                text=True,
                bufsize=1,
            )
        self.send(json.dumps({"study": str(study), "project": project, "live": live}))

    def send(self, line: str) -> None:
        """A process that is gone hears nothing, which is no error: its end shows in `next_event`."""
        pipe = self._pipe(self._process.stdin)
        try:
            pipe.write(f"{line}\n")
            pipe.flush()
        except (OSError, ValueError):
            pass

    def next_event(self, timeout: float | None) -> dict[str, Any] | None:
        """What it says next; None when it has ended, or said nothing for `timeout` seconds, which ends it."""
        timer = threading.Timer(timeout, self.kill) if timeout else None
        if timer:
            timer.start()
        try:
            line = self._pipe(self._process.stdout).readline()
            return json.loads(line) if line.endswith("\n") else None
        except ValueError:
            return None
        finally:
            if timer:
                timer.cancel()

    def kill(self) -> None:
        """At once; wandb-core ends with it."""
        self._process.kill()
        self._process.wait()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def _take(event: dict[str, Any], report: SyncReport) -> None:
    kind = event["event"]
    if kind == "uploaded":
        report.uploaded.append(event["number"])
        report.failed.pop(event["run"], None)
    elif kind == "failed":
        report.failed[event["run"]] = event["why"]
    elif kind == "busy":
        report.problem = "another process is uploading this study's runs: a study that runs does so itself"
    elif kind in ("refused", "unreachable", "broken"):
        report.problem = event["why"]
    elif kind == "sweep":
        report.sweep, report.no_sweep = event["url"], None
    elif kind == "no sweep":
        report.no_sweep = event["why"]
    elif kind == "sweep left open":
        report.left_open = event["why"]
    elif kind == "reached":
        report.problem = None
    elif kind == "end":
        report.left, report.running, report.failed = event["left"], event["running"], event["failed"]


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
