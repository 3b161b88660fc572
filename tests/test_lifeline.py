"""A process that cannot reach its cluster's head ends, having said why; one that can goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medtune.errors import Leaving
from medtune.lifeline import Lifeline
from medtune.record import read_events


def wait_until(true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def line(port: int, draining=lambda: False, **more) -> Lifeline:
    return Lifeline(f"127.0.0.1:{port}", draining, every=0.05, patience=0.5, **more)


def test_it_ends_the_process_when_the_head_is_gone_and_not_before() -> None:
    ended, said = threading.Event(), []
    head = socket.create_server(("127.0.0.1", 0))
    watch = line(head.getsockname()[1], end=ended.set)
    watch.note = said.append
    watch.start()
    time.sleep(1.0)
    assert not ended.is_set(), "the head was there, longer than its absence is borne"
    gone = time.monotonic()
    head.close()
    assert ended.wait(10) and time.monotonic() - gone >= 0.4
    assert len(said) == 1 and "127.0.0.1" in said[0] and "could not be reached" in said[0]


def test_a_head_that_comes_back_in_time_ends_nothing() -> None:
    ended = threading.Event()
    head = socket.create_server(("127.0.0.1", 0))
    port = head.getsockname()[1]
    line(port, end=ended.set).start()
    for _ in range(4):
        head.close()
        time.sleep(0.25)
        head = socket.create_server(("127.0.0.1", port), reuse_port=True)
        time.sleep(0.15)
    assert not ended.is_set()
    head.close()
    assert ended.wait(10)


def test_a_storage_that_hangs_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtune.lifeline._LAST_WORDS", 0.1)
    ended, never = threading.Event(), threading.Event()
    watch = line(1, end=ended.set)
    watch.note = lambda words: never.wait()
    watch.start()
    assert ended.wait(10)
    never.set()


def test_a_real_process_ends_and_its_record_says_why(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from medtune.lifeline import Lifeline; from medtune.record import LocalRecord\n"
        "line = Lifeline('127.0.0.1:1', lambda: False, every=0.05, patience=0.3)\n"
        "line.note = lambda words: LocalRecord(Path(sys.argv[1])).event('cut off', message=words)\n"
        "line.start(); time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, timeout=30, check=False)
    assert done.returncode == 1
    (event,) = read_events(tmp_path)
    assert event["kind"] == "cut off" and "127.0.0.1:1 could not be reached for" in event["message"]


def test_a_machine_about_to_leave_takes_no_more_trials() -> None:
    answers = iter([ConnectionError("no answer"), False, True])

    def draining() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with socket.create_server(("127.0.0.1", 0)) as head:
        watch = line(head.getsockname()[1], draining, end=lambda: None)
        watch.require_staying()
        watch.start()
        wait_until(lambda: watch.leaving)
        with pytest.raises(Leaving, match="takes no more trials"):
            watch.require_staying()
