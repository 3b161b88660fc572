"""The uploader's own process: `python -m medtune.wandb_engine`, started by `medtune.wandb_sync`.

It drives wandb-core as `wandb beta sync` does, but many runs in one process, new ones as they appear, and with the
outcome of each: the command exits with 0 and marks a run as synced also where the server took nothing of it.
stdin: one JSON line of settings, then "stop SECONDS"; its end means that the parent has died. stdout: JSON lines.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from medtune.wandb_env import KeyRefused, TrackingError, check, find_account
from medtune.wandb_files import RunFile, run_files
from medtune.wandb_sweep import SweepKeeper

PARALLEL = 8
"""Finished runs uploaded at a time; running ones are all followed."""
RUN_SECONDS = 180.0
"""The longest that one finished run may take."""
HEARD_SECONDS = 5.0
"""After which a run that is being followed is there to be attached to the sweep."""
_ERROR = 40


class UploadFailed(Exception):
    """The server did not take a run."""


@dataclass
class Trouble:
    """What wandb-core waits for, if that is a server that failed, and since when."""

    what: str = ""
    since: float = 0.0

    def set(self, what: set[str]) -> None:
        """Take note of what is wrong now."""
        if what and not self.what:
            self.since = time.monotonic()
        self.what = "; ".join(sorted(what))

    @property
    def lasting(self) -> bool:
        """Whether it is more than a hiccup."""
        return bool(self.what) and time.monotonic() - self.since > 2


@dataclass
class Upload:
    """A run on its way."""

    file: RunFile
    follow: bool
    """Whether it is being written to."""
    begun: float = field(default_factory=time.monotonic)
    trouble: Trouble = field(default_factory=Trouble)
    task: asyncio.Future[None] = field(init=False)


class Engine:
    """Uploads a study's runs until all are there (`live=False`), or until told to stop."""

    def __init__(self, study: Path, project: str, live: bool, emit: Callable[..., None]) -> None:
        self.study = study
        self.project = project
        self.live = live
        self.emit = emit
        self.uploads: dict[str, Upload] = {}
        self.failed: dict[str, str] = {}
        self.again: dict[str, float] = {}
        self.failures = 0
        self.reachable = False
        self.deadline: float | None = None
        self.cache: dict[Path, RunFile] = {}
        self.there: set[Path] = set()

    def stop(self, seconds: float) -> None:
        """Finish what can be finished within `seconds`. From any thread."""
        self.deadline = time.monotonic() + seconds

    async def run(self, core: Core) -> None:
        """To the end."""
        self.core = core
        await self._reach()
        account = find_account()
        assert account is not None
        entity = core.settings.entity
        self.keeper = SweepKeeper(account, self.study, self.project, entity, self.emit)
        while self.reachable:
            files = run_files(self.study, self.cache)
            self._let_go(files)
            waiting = [file for file in files if self._wanted(file)]
            attaching = self.keeper.tend(files, self._followed())
            if self._over(waiting, attaching):
                break
            self._begin(waiting)
            await self._pause(1.0 if self.live else 0.1)

    async def _reach(self) -> None:
        account = find_account()
        assert account is not None
        said = ""
        while not (self.reachable or (said and self.deadline is not None)):
            # A server that says nothing takes longer to ask than there is time at the end.
            asking = asyncio.ensure_future(asyncio.to_thread(check, account))
            while not asking.done():
                if self.deadline is not None and (said or time.monotonic() > self.deadline):
                    return
                await asyncio.wait({asking}, timeout=0.1)
            try:
                asking.result()
                self.reachable = True
                self.emit("reached", url=account.url)
                return
            except TrackingError as error:
                refused = isinstance(error, KeyRefused)
                if str(error) != said:
                    said = str(error)
                    self.emit("refused" if refused else "unreachable", why=said)
            if not self.live:
                return
            await self._pause(1e9 if refused else 20)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless told to stop."""
        told = self.deadline
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self.deadline == told:
            await asyncio.sleep(min(0.1, left))

    def _followed(self) -> set[str]:
        """Running runs that the server has heard of by now."""
        heard = time.monotonic() - HEARD_SECONDS
        return {upload.file.run for upload in self.uploads.values() if upload.follow and upload.begun < heard}

    def _over(self, waiting: list[RunFile], attaching: bool) -> bool:
        if self.deadline is not None:
            hopeless = bool(self.uploads) and all(upload.trouble.lasting for upload in self.uploads.values())
            return hopeless or time.monotonic() > self.deadline or not (self.uploads or waiting or attaching)
        # The server began to fail: what is left would fail as well, slowly.
        return not self.live and (self.failures >= 3 or not (self.uploads or waiting or attaching))

    def _wanted(self, file: RunFile) -> bool:
        """Whether it is to be started, now or later."""
        if file.run in self.uploads or file.path in self.there:
            return False
        if file.uploaded:
            if file.finished:
                self.there.add(file.path)
            return False
        if not self.live:
            return file.quiet and file.run not in self.failed
        if self.deadline is not None:
            return file.finished and file.run not in self.failed
        return file.finished or not file.quiet

    def _let_go(self, files: list[RunFile]) -> None:
        """Stop following what an attempt after it replaced and what nobody writes to any more."""
        for file in files:
            upload = self.uploads.get(file.run)
            if upload is None or not upload.follow:
                continue
            replaced = file.path != upload.file.path
            if replaced or (not file.finished and (file.quiet or self.deadline is not None)):
                upload.task.cancel()

    def _begin(self, waiting: list[RunFile]) -> None:
        for file in waiting:
            follow = self.live and not file.finished
            busy = sum(not upload.follow for upload in self.uploads.values())
            if (follow or busy < PARALLEL) and self.again.get(file.run, 0) <= time.monotonic():
                upload = Upload(file, follow)
                self.uploads[file.run] = upload
                upload.task = asyncio.ensure_future(self._upload(upload))

    async def _upload(self, upload: Upload) -> None:
        file = upload.file
        limit = None if upload.follow else RUN_SECONDS
        try:
            await asyncio.wait_for(self.core.sync(file.path, upload.follow, upload.trouble), limit)
            file.mark_uploaded(file.path.stat().st_size if upload.follow else file.size)
            self.failed.pop(file.run, None)
            self.failures = 0
            self.emit("uploaded", run=file.run, number=file.number)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            why = f"no end within {limit} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
            # What the server did says more than what wandb-core concludes from it.
            self.failed[file.run] = upload.trouble.what or why
            self.failures += 1
            self.again[file.run] = time.monotonic() + min(300, 15 * 2 ** min(self.failures, 5))
            self.emit("failed", run=file.run, number=file.number, why=self.failed[file.run])
        finally:
            del self.uploads[file.run]


class Core:
    """wandb-core, through the calls that `wandb beta sync` of wandb 0.31 makes: the one place that knows them."""

    def __init__(self, live: bool) -> None:
        from wandb.sdk import wandb_setup

        self.setup = wandb_setup.singleton()
        self.settings = self.setup.settings.model_copy()
        self.settings.update_from_dict(
            {
                "silent": True,
                "x_graphql_timeout_seconds": 15,
                "x_file_stream_timeout_seconds": 15,
                "x_file_stream_transmit_interval": 10 if live else 1,
            }
        )
        if not live:
            once = {"retry_max": 2, "retry_wait_min_seconds": 1, "retry_wait_max_seconds": 2}
            for part in ("graphql", "file_stream", "file_transfer"):
                self.settings.update_from_dict({f"x_{part}_{name}": value for name, value in once.items()})
            self.settings.update_from_dict({"x_file_transfer_timeout_seconds": 30})
        self.service = self.setup.ensure_service()

    async def sync(self, path: Path, follow: bool, trouble: Trouble) -> None:
        """Upload one file; `follow`: until its run ends. Raises UploadFailed if the server did not take all of it."""
        with tempfile.TemporaryDirectory(prefix="medtune-wandb-") as logs:
            errors = await self._operate(path, follow, trouble, Path(logs))
            # Files of a run (its tables, its summary) that were given up show in wandb-core's log alone.
            errors = errors or sorted(set(_given_up(Path(logs))))[:1]
        if errors:
            raise UploadFailed("; ".join(dict.fromkeys(error.partition("] ")[2] or error for error in errors)))

    async def _operate(self, path: Path, follow: bool, trouble: Trouble, logs: Path) -> list[str]:
        settings = self.settings.model_copy()
        settings.update_from_dict({"root_dir": str(logs)})
        request = await self.service.init_sync(
            {path},
            settings,
            cwd=None,
            live=follow,
            entity=settings.entity or "",
            project="",
            run_id="",
            job_type="",
            tag_replacements={},
        )
        operation = (await request.wait_async(timeout=10)).id
        handle = await self.service.sync(operation, parallelism=1)
        errors: list[str] = []
        watch = asyncio.ensure_future(self._watch(operation, errors, trouble))
        try:
            response = await handle.wait_async(timeout=None)
        finally:
            watch.cancel()
        return errors + [message.content for message in response.messages if message.severity >= _ERROR]

    async def _watch(self, operation: str, errors: list[str], trouble: Trouble) -> None:
        while True:
            await asyncio.sleep(0.5)
            status = await (await self.service.sync_status(operation)).wait_async(timeout=30)
            errors += [message.content for message in status.new_messages if message.severity >= _ERROR]
            said = [part.error_status for stats in status.stats for part in stats.operations if part.error_status]
            now = {text.removeprefix("retrying").lstrip(": ") for text in said}
            # The last trouble stays when the operation ends with an error that does not name it.
            if now or not errors:
                trouble.set(now)


def _given_up(logs: Path) -> Iterator[str]:
    for log in logs.rglob("*.log"):
        for line in log.read_text(errors="replace").splitlines():
            if '"level":"ERROR"' in line and "giving up" in line:
                yield json.loads(line)["msg"].splitlines()[0]


def main() -> None:
    """Entry point of the process."""
    settings = json.loads(sys.stdin.readline())
    study = Path(settings["study"])
    # Libraries print what they like to stdout; the parent is to hear us alone.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.nice(5)

    def emit(event: str, **fields: Any) -> None:
        try:
            out.write(json.dumps({"event": event, **fields}) + "\n")
        except OSError:
            os._exit(1)

    engine = Engine(study, settings["project"], settings["live"], emit)
    threading.Thread(target=_listen, args=(engine,), daemon=True).start()
    lock = filelock.FileLock(study / "wandb" / "upload.lock")
    try:
        lock.acquire(timeout=0.5)
        _run(engine)
    except filelock.Timeout:
        emit("busy")
    except BaseException as error:
        emit("broken", why=f"{type(error).__name__}: {error}")
    finally:
        # wandb's own way out waits for its service, and that for the server.
        os._exit(0)


def _run(engine: Engine) -> None:
    core = Core(engine.live)
    core.setup.asyncer.run(lambda: engine.run(core))
    left = [file.run for file in run_files(engine.study) if not file.uploaded]
    running = [file.run for file in run_files(engine.study) if file.run in left and not file.quiet]
    engine.emit("end", left=[run for run in left if run not in running], running=running, failed=engine.failed)


def _listen(engine: Engine) -> None:
    """Until the parent says stop, or is gone: then there is nobody to work for."""
    for line in sys.stdin:
        if line.startswith("stop"):
            engine.stop(float(line.split()[1]))
    os._exit(1)


if __name__ == "__main__":
    main()
