"""What happens when a folder is full, read-only or gone: units, and a whole study on a small disk of its own."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from benchmarks import kill_resume
from medtune.errors import StorageFault
from medtune.record import LocalRecord, read_epochs, read_events
from medtune.results import load_study
from medtune.search.ledger import Ledger
from medtune.storage import patience as patience_module
from medtune.storage.attempt import Workplace
from medtune.storage.patience import Patience, held, patiently
from tests.storage.test_attempt import spec  # noqa: F401 a fixture


class Failing:
    """An action that fails so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self) -> str:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return "done"


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    """Of earlier tests an attempt may have left this process its patience."""
    monkeypatch.setattr(patience_module, "_current", None)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(patience_module, "TOLD_SECONDS", 0.0)
    monkeypatch.setattr(patience_module, "_FIRST_PAUSE", 0.01)


def test_it_is_tried_again_and_said_when_it_begins_and_ends(at_once):
    waits, went_on = [], []
    patience = Patience(60, waits=waits.append, went_on=went_on.append)
    assert patience("the file", Failing(3)) == "done"
    assert waits == ["storage fails: the file: No space left on device; trying again for 1 min"]
    assert went_on == ["storage works again after 0 s: the file (No space left on device before)"]


def test_it_ends_in_a_fault_of_the_machine_that_says_how_to_wait_longer(at_once):
    with pytest.raises(StorageFault, match=r"the file: No space left on device, for \d s \(--storage-patience 0.1\)"):
        Patience(0.1)("the file", Failing(1000))


def test_who_is_told_to_stop_waits_no_more(at_once):
    started = time.monotonic()
    with pytest.raises(StorageFault, match="told to stop"):
        Patience(60, give_up=lambda: True)("the file", Failing(1000))
    assert time.monotonic() - started < 5


def test_other_errors_are_not_storage_s(at_once):
    def wrong():
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        Patience(60)("the file", wrong)
    with pytest.raises(OSError, match="No space"):
        patiently("the file", Failing(1))  # a process without patience


def test_a_share_that_is_gone_is_waited_for_and_not_made_anew(spec, tmp_path):  # noqa: F811
    share = tmp_path / "share"
    study = share / "s"
    study.mkdir(parents=True)
    (study / "study.json").write_text("{}")
    Workplace(replace(spec, folder=str(study))).begin()
    assert (study / "trials" / "0007" / "attempt-1").is_dir()
    share.rename(tmp_path / "elsewhere")
    share.mkdir()  # what a mount point is without its mount
    with pytest.raises(StorageFault, match=r"study.json is gone from .*: is the folder that holds it mounted"):
        Workplace(replace(spec, folder=str(study), storage_patience=0.3)).begin()
    assert list(share.iterdir()) == []
    place = Workplace(replace(spec, folder=str(study), attempt=2, storage_patience=30))
    back = threading.Timer(0.5, lambda: (share.rmdir(), (tmp_path / "elsewhere").rename(share)))
    back.start()
    place.begin()
    back.join()
    assert (study / "trials" / "0007" / "attempt-2").is_dir()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: needs root")


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB, as (where it is, a folder that it is mounted at besides)."""
    there, share = tmp_path / "disk", tmp_path / "share"
    there.mkdir()
    share.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", there], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    subprocess.run(["mount", "--bind", there, share], check=True)
    yield there, share
    for mounted in (share, there):
        subprocess.run(["umount", "-l", mounted], check=False)


def fill(folder) -> None:
    """Take all room there is."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (4096, 1):
            while True:
                try:
                    if file.write(b"x" * size) < size:
                        break
                except OSError:
                    break


@needs_root
def test_no_half_line_is_left_on_a_full_disk(disk):
    there, _ = disk
    record, journal = LocalRecord(there / "attempt-1"), there / "ledger.journal"
    Ledger.open(journal, "s", "minimize")
    patience = Patience(60)
    fill(there)
    freed = threading.Timer(1.0, (there / "filler").unlink)
    freed.start()
    with held(patience):
        for epoch in range(100):  # some of them cross into a page that is not to be had
            record.epoch({"epoch": epoch, "text": "y" * 200})
    freed.join()
    raw = (there / "attempt-1" / "epochs.jsonl").read_bytes().splitlines()
    assert len(raw) == 100 and [line["epoch"] for line in read_epochs(there / "attempt-1")] == list(range(100))

    ledger = Ledger.open(journal, "s", "minimize")
    fill(there)
    freed = threading.Timer(1.0, (there / "filler").unlink)
    freed.start()
    with held(patience):
        for number in range(100):
            ledger.study.set_user_attr(f"fact-{number}", "z" * 200)
    freed.join()
    assert len(Ledger.read(journal).study.user_attrs) == 100
    fill(there)
    whole = journal.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        for number in range(100):
            whole = journal.read_bytes()
            ledger.study.set_user_attr(f"more-{number}", "z" * 200)
    assert journal.read_bytes() == whole


@needs_root
@pytest.mark.slow
def test_a_study_outlives_a_full_disk_and_a_share_that_is_gone_for_a_while(disk):
    there, share = disk
    process = subprocess.Popen(
        kill_resume.command(share, 8),
        env=kill_resume.environment(0.5),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()

    def await_word(word, count=1):
        end = time.monotonic() + 120
        while "".join(lines).count(word) < count:
            assert time.monotonic() < end and process.poll() is None, "".join(lines)
            time.sleep(0.1)

    await_word("RUNNING epoch")
    fill(there)
    await_word("storage fails")
    (there / "filler").unlink()
    await_word("storage works again")
    said = "".join(lines).count("storage fails")
    subprocess.run(["umount", "-l", share], check=True)
    await_word("storage fails", said + 1)
    assert list(share.iterdir()) == [], "nothing is written where the share is not"
    subprocess.run(["mount", "--bind", there, share], check=True)
    assert process.wait(timeout=180) == 0, "".join(lines)
    study = load_study("kill", share)
    kill_resume.check(study, 8)  # each figure is the one that an undisturbed trial has
    assert [(row.faults, row.attempt) for row in study.rows] == [(0, 1)] * 8
    events = [event for folder in study.folder.glob("trials/*/attempt-*") for event in read_events(folder)]
    notes = [event["message"] for event in events if event["kind"] == "storage"]
    assert notes and all(note.startswith("storage works again after") for note in notes)


@needs_root
@pytest.mark.slow
def test_a_study_whose_disk_stays_full_stops_with_a_clear_word_and_goes_on_later(disk):
    there, share = disk
    environment = kill_resume.environment(0.5)
    command = [*kill_resume.command(share, 8), "--patience", "3"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "RUNNING epoch" in line:
            break
    fill(there)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "was stopped, as its storage fails" in output, output
    assert "No space left on device" in output and "the same command goes on with it" in output
    (there / "filler").unlink()
    assert not any(row.state == "FAIL" for row in load_study("kill", share).rows)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kill_resume.check(load_study("kill", share), 8)
