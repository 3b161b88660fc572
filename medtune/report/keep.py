"""The page beside a study's records: written again while the study runs, and at its end.

While it runs that is another process of the lowest priority, every few minutes: the search waits for nothing, and dies of no
fault of a page. A study in a bucket gets its page at the end alone, as each page reads some dozens of trials' records there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from medtune.errors import MedtuneError
from medtune.results import Study
from medtune.storage.home import Home

EVERY = 300.0
"""Seconds from one page to the next."""


@contextlib.contextmanager
def kept_up(home: Home, every: float = EVERY) -> Iterator[None]:
    """While a study runs: its page is written again every so many seconds."""
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(home.folder, every, over), daemon=True, name="page")
    if home.bucket is None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if home.bucket is None:
            thread.join()


def _keep(folder: Path, every: float, over: threading.Event) -> None:
    while not over.wait(every):
        process = subprocess.Popen(
            [sys.executable, "-m", "medtune.cli", "report", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the driver
        )
        with contextlib.suppress(OSError):  # it may have ended at once
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        while process.poll() is None and not over.wait(0.2):
            pass
        process.kill()
        process.wait()


def last_page(study: Study) -> str:
    """Write the page of a study that has ended, in the bucket where it is kept in one; returns words on where it is."""
    from medtune.report.page import FILE, write  # more than a second of imports, and a study begins without

    path = study.folder / FILE
    try:
        study.keep(write(study, path))
    except MedtuneError as error:
        return f"no page for the browser: {error}"
    return f"page for the browser: {study.where}/{FILE}"
