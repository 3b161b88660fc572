"""A server as users start it, in a process of its own, on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    log: Path
    url: str

    def predict(self, file: bytes, *, form: bool = False, **more: Any) -> requests.Response:
        """Send an image, as the body or in a form."""
        headers = {**({} if form else {"Content-Type": "image/png"}), **more.pop("headers", {})}
        what = {"files": {"file": ("image.png", file)}} if form else {"data": file}
        return requests.post(f"{self.url}/predict", headers=headers, timeout=60, **what, **more)

    def health(self) -> requests.Response:
        return requests.get(f"{self.url}/health", timeout=10)

    def processes(self, named: str = "") -> list[int]:
        """Processes of the server's session of Ray, by a part of their command line."""
        return [pid for pid, line in below(self.process.pid) if named in line]


@contextlib.contextmanager
def served(bundle: Path, folder: Path, *args: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """Serve a bundle with `medtune serve`; at the end it is told to stop, and has to."""
    with starting(bundle, folder, *args, env=env) as (process, log):
        url = wait_for(log, r"serving on (\S+)", process)
        yield Served(process, log, url)


@contextlib.contextmanager
def starting(
    bundle: Path, folder: Path, *args: str, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The process and its output, as soon as it runs."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "medtune.cli", "serve", str(bundle), "--port", "0", *args]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, env={**os.environ, **(env or {})})
    try:
        yield process, log
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()


def wait_for(log: Path, pattern: str, process: subprocess.Popen[str], seconds: float = 180) -> str:
    """The first group of a pattern, once it is in the output."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := re.search(pattern, log.read_text()):
            return found.group(1)
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"no {pattern!r} in: {log.read_text()}")


def below(root: int) -> list[tuple[int, str]]:
    """Processes that come from `root`, with their command lines."""
    lines = subprocess.run(["ps", "-eww", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in lines.splitlines()]
    found: list[tuple[int, str]] = []
    parents = {root}
    while parents:
        new = [(int(r[0]), r[3]) for r in rows if int(r[1]) in parents and not r[2].startswith("Z")]
        found += new
        parents = {pid for pid, _ in new}
    return found
