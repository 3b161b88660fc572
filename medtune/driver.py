"""The driver on a cluster: goes on when the client that started it goes, and leaves word of itself in the study's folder.

`ray submit` runs it in a terminal over SSH and turns every exit status into 1. So on a cluster what a driver says also goes
to `driver.log`, and how it ended is in `driver.json`, which `medtune studies` reads.
"""

from __future__ import annotations

import contextlib
import filecmp
import io
import os
import queue
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import medtune
from medtune.errors import MedtuneError, StudyError
from medtune.record import read_json, write_json

RECORD = "driver.json"
LOG = "driver.log"

Outcome = Callable[[Path, bool], tuple[int, str]]
"""What a driver that came to its end has to say of the study in a folder: see `best_trial`."""


class LooseStream(io.TextIOBase):
    """Writes to a terminal that may be gone or asleep: never blocks, never fails, drops what the terminal does not take."""

    def __init__(self, stream: TextIO, room: int = 1000) -> None:
        self._stream = stream
        self._pieces: queue.Queue[str] = queue.Queue(room)
        threading.Thread(target=self._write_on, name="terminal", daemon=True).start()

    def _write_on(self) -> None:
        while True:
            piece = self._pieces.get()
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(piece)
                self._stream.flush()
            self._pieces.task_done()

    def write(self, text: str) -> int:
        with contextlib.suppress(queue.Full):
            self._pieces.put_nowait(text)
        return len(text)

    def drain(self, seconds: float) -> None:
        """Give what was written so long to get out."""
        deadline = time.monotonic() + seconds
        while self._pieces.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextlib.contextmanager
def outliving_client() -> Any:
    """On a cluster: a terminal that is closed, cut off or asleep changes nothing but what is seen there."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    out, err = LooseStream(sys.stdout), LooseStream(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        for stream in (out, err):
            stream.drain(5)
        signal.signal(signal.SIGHUP, old)


def best_trial(folder: Path, show: bool) -> tuple[int, str]:
    """The outcome of a study that has ended: exit status and the best trial in words; `show`: print all of it as well."""
    from medtune.results import best, load_study, print_outcome

    if show:
        print_outcome(folder)
    try:
        answer = best(load_study(str(folder)))
    except StudyError as none:
        return 1, str(none)
    except OSError as error:
        return 0, f"the best could not be read back: {error}"
    trial = answer["trials"][0]
    return 0, f"best: trial {trial['number']}, {answer['ranked_by']} {trial['ranked_value']:.4f}"


class DriverRecord:
    """A driver's word of itself, from its start to its end; a context manager round its work.

    `log`: where its lines go as well, on a cluster; None elsewhere. However the work ends, `driver.json` says so.
    """

    def __init__(self, folder: Path, *, on_cluster: bool, outcome: Outcome = best_trial) -> None:
        self.folder = folder
        self._found = outcome
        self.log: TextIO | None = None
        self._on_cluster = on_cluster
        self._record: dict[str, Any] = {}

    def __enter__(self) -> DriverRecord:
        if self._on_cluster:
            self.log = (self.folder / LOG).open("a", buffering=1)
            self.log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n")
        self._write(
            state="running",
            host=socket.gethostname(),
            pid=os.getpid(),
            began=time.time(),
            command=sys.argv,
            log=str(self.folder / LOG) if self.log else None,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state, status, message = self._outcome(error)
        # The disk may be what the work ended for: its error must not be lost behind another.
        with contextlib.suppress(OSError):
            if self.log:
                if state == "crashed":
                    traceback.print_exception(kind, error, trace, file=self.log)
                self.log.write(f"--- {state}, exit status {status}: {message}\n")
                self.log.close()
            self._write(state=state, status=status, message=message, ended=time.time())

    def _outcome(self, error: BaseException | None) -> tuple[str, int, str]:
        if error is None:
            with contextlib.redirect_stdout(self.log) if self.log else contextlib.nullcontext():
                return ("ended", *self._found(self.folder, self.log is not None))
        if isinstance(error, KeyboardInterrupt):
            return "stopped", 130, "the same command goes on from here"
        if isinstance(error, MedtuneError):
            return "failed", 2, str(error)
        return "crashed", 1, f"{type(error).__name__}: {error}"

    def _write(self, **values: Any) -> None:
        self._record |= values
        write_json(self.folder / RECORD, self._record)


def add_outcome(folder: Path, message: str, show: Callable[[], object]) -> list[Path]:
    """What came of a study after its driver ended, into the driver's record and, where that is on this machine, its log.

    Returns the files that were written. Raises OSError.
    """
    record = read_json(folder / RECORD)
    if record is None:
        return []
    write_json(folder / RECORD, {**record, "message": message})
    log = Path(record["log"] or "-")
    if record["host"] != socket.gethostname() or not log.exists():
        return [folder / RECORD]
    with log.open("a") as file, contextlib.redirect_stdout(file):
        show()
        print(f"--- {message}")
    return [folder / RECORD, log]


def last_driver(folder: Path, running: bool) -> dict[str, Any] | None:
    """What the last driver of a study left: state, status, message, host, log, ...; None where there was none.

    `running`: whether one drives it now; one that only its record takes for running was killed.
    """
    record = read_json(folder / RECORD)
    if record and record["state"] == "running" and not running:
        return {**record, "state": "killed"}
    return record


def who_drives(folder: Path) -> str:
    """A sentence on the driver that holds a study, for the error of the next one; empty where it left no word."""
    record = read_json(folder / RECORD)
    if not record or record["state"] != "running":
        return ""
    since = time.strftime("%H:%M", time.localtime(record["began"]))
    log = f"; follow it with: ray exec cluster.yaml 'tail -f {record['log']}'" if record["log"] else ""
    return f"Process {record['pid']} on {record['host']} has driven it since {since}{log}. "


def require_same_script(script: Path, checkout: Path | None = None) -> None:
    """`ray submit` copies the script alone, as it is now; the rest is as of the last `ray up`.

    `checkout`: this node's; default: where the package is. Raises StudyError if its script of that name differs.
    """
    ours = (checkout or Path(medtune.__file__).parents[1]) / "sweeps" / script.name
    if ours.exists() and script.exists() and not filecmp.cmp(script, ours, shallow=False):
        raise StudyError(
            f"{script} is not the same as {ours}: the code was edited after the cluster got it, and its nodes would train "
            "with the older. `ray up --no-restart cluster.yaml` renews it on every node and stops nothing; then submit again"
        )
