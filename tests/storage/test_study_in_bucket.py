"""A study that is kept in S3, on a cluster whose nodes know neither the server nor its keys: killed, moved, held up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from benchmarks import kill_resume
from medtune import cli
from medtune.errors import StorageFault
from medtune.results import epochs, load_study
from medtune.search.ledger import Ledger
from medtune.storage import home as home_module
from medtune.storage.bucket import Bucket
from medtune.storage.home import STALENESS, BucketHome
from medtune.storage.lease import Lease, Replaced
from tests.support.s3 import told
from tests.support.two_nodes import private_cluster

TRIALS = 10


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """One node of two cores, started by somebody who was told nothing of S3."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    monkeypatch.setenv("PLAYED_SECONDS", "1.5")
    with private_cluster(num_cpus=2) as found:
        yield found


class Driver:
    """A driver on a head of its own: nothing is shared with another but the bucket."""

    def __init__(self, uri, cluster, s3, head: Path) -> None:
        environment = kill_resume.environment(1.5) | s3.environment
        environment |= {"RAY_ADDRESS": cluster.address, "XDG_CACHE_HOME": str(head)}
        self.head = head
        self.process = subprocess.Popen(
            kill_resume.command(uri, TRIALS), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True).start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def await_word(self, word: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while word not in self.output:
            assert time.monotonic() < end and self.process.poll() is None, self.output
            time.sleep(0.1)

    @property
    def journal(self) -> Path | None:
        return next(self.head.glob("medtune/storage/*/driver/kill/ledger.journal"), None)


def size_in(bucket) -> int:
    pieces = [(int(key.split("/")[-1]), found.size) for key, found in bucket.files("kill/ledger").items()]
    return max((offset + size for offset, size in pieces), default=0)


def watch(driver, bucket, seconds):
    """(time, rows by number, bytes here, bytes in the bucket), over and over."""
    seen = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        here = driver.journal.stat().st_size
        rows = {row.number: (row.attempt, row.epoch, row.finished) for row in Ledger.read(driver.journal).rows()}
        seen.append((time.monotonic(), rows, here, size_in(bucket)))
        time.sleep(0.3)
    return seen


def staleness(seen) -> float:
    """The longest that bytes of the ledger were not in the bucket."""
    worst = 0.0
    for moment, _, _, there in seen:
        late = [then for then, _, here, _ in seen if then <= moment and here > there]
        worst = max(worst, moment - min(late, default=moment))
    return worst


@pytest.mark.slow
def test_killed_and_gone_on_with_by_another_head_while_the_server_is_silent(cluster, s3, tmp_path, monkeypatch, capsys):
    uri = f"s3://sweeps/study-{os.getpid()}"
    first = Driver(uri, cluster, s3, tmp_path / "head-1")
    first.await_word("RUNNING epoch")
    with told(s3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "reader"))
        bucket = Bucket(uri)
        seen = watch(first, bucket, STALENESS + 3)
        first.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        first.process.wait()
        print(f"ledger in the bucket at most {staleness(seen):.1f} s old")
        with capsys.disabled():
            print(capsys.readouterr().out)
        assert staleness(seen) < STALENESS
        there = {row.number: (row.attempt, row.epoch, row.finished) for row in load_study("kill", uri).rows}
        for moment, rows, _, _ in seen:
            if moment < killed - STALENESS:
                assert all(there[number] >= row for number, row in rows.items()), "older than said, and lost"
        assert any(not finished for _, _, finished in there.values()), "killed too late for this test"

        second = Driver(uri, cluster, s3, tmp_path / "head-2")
        second.await_word("going on with")
        second.await_word("RUNNING epoch")
        with s3.silent():
            second.await_word("storage fails")
        second.await_word("storage works again")
        assert second.process.wait(timeout=180) == 0, second.output
        study = load_study("kill", uri)
        for row in study.rows:
            lines = epochs(study, row)
            assert [line["epoch"] for line in lines] == list(range(1, row.epoch + 1)), "each epoch once"
        kill_resume.check(study, TRIALS)
        assert not study.running
        assert cli.main(["best", "kill", "--storage", uri, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert Path(answer["trials"][0]["checkpoint"]).stat().st_size > 0
        assert cli.main(["studies", "--storage", uri]) == 0 and "kill" in capsys.readouterr().out
        assert cli.main(["best", "kil", "--storage", uri]) == 2 and "Did you mean 'kill'" in capsys.readouterr().err
        kept = {key for key in bucket.files("kill/trials") if key.endswith(".safetensors")}
        assert kept and all("/best-" in key for key in kept), "what is not kept is deleted in the bucket as well"
        nowhere_but_in_memory(s3.environment["AWS_SECRET_ACCESS_KEY"], cluster, tmp_path, bucket, second.output)
    last = {f"{row.number:04d}-{row.attempt}" for row in study.rows}
    left = {path.parents[3].name for path in (tmp_path / "node").rglob("checkpoints/*")}
    assert not left & last, "a node keeps nothing of an attempt that ended; what was killed is swept up later"


def nowhere_but_in_memory(secret, cluster, folder, bucket, output):
    session = Path(cluster.head_node.get_session_dir_path())
    files = [path for place in (session, folder) for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("gcs_server" in path.name for path in files), "Ray's logs are among them"
    found = [path for path in files if secret.encode() in path.read_bytes()]
    assert not found and secret not in output
    assert not [key for key in bucket.files() if secret.encode() in (bucket.read(key) or b"")]


@pytest.fixture
def old_driver(bucket, head, monkeypatch):
    """The home of a driver that another one takes the study from."""
    monkeypatch.setattr("medtune.storage.lease._SETTLE", 0.0)
    monkeypatch.setattr(home_module, "RENEW", 0.2)
    home = BucketHome(bucket, "s", 1.0)
    with contextlib.suppress(StorageFault), home.driven(print):
        (home.folder / "study.json").write_text('{"id": "s-1"}')
        home.ledger.write_text("0\n")
        with home.begun():
            yield home


def test_an_old_driver_that_comes_back_stops_and_changes_nothing(bucket, old_driver):
    study = bucket.under("s")
    checkpoint = "trials/0000/attempt-1/checkpoints/best-0001.safetensors"
    study.write(checkpoint, b"x")
    other = Lease(study, "s")
    other._write()
    end = time.monotonic() + 20
    while old_driver.fault is None and time.monotonic() < end:
        time.sleep(0.05)
    assert isinstance(old_driver.fault, Replaced)
    old_driver.lease.renewed -= 1000  # as after a sleep
    with pytest.raises(Replaced):
        old_driver.before_launch(0)
    with pytest.raises(Replaced):
        old_driver.settle(0, "PRUNED", {0: None})
    assert checkpoint in study.files() and "trials/0000/outcome.json" not in study.files()


def test_a_ledger_that_cannot_be_brought_into_the_bucket_for_long_stops_the_study(bucket, old_driver, monkeypatch):
    def gone(key, data):
        raise OSError("nobody answers")

    monkeypatch.setattr(old_driver.segments.bucket, "write", gone)
    old_driver.ledger.write_text("0\n1\n")
    with pytest.raises(StorageFault, match=r"the ledger in s3://sweeps/.*: nobody answers, for \d s"):
        old_driver.before_launch(0)


def test_this_machine_s_own_ledger_is_taken_where_it_is_longer_than_the_bucket_s(bucket, head, monkeypatch):
    monkeypatch.setattr("medtune.storage.lease._SETTLE", 0.0)

    def drive(write=None):
        home = BucketHome(bucket, "s", 1.0)
        with home.driven(print):
            (home.folder / "study.json").write_text('{"id": "s-1"}')
            if write:
                home.ledger.write_text(write)
            with home.begun():
                return home, home.ledger.read_text()

    home, _ = drive("0\n")
    home.ledger.write_text("0\n1\n")  # it died before it brought the second line there
    assert drive()[1] == "0\n1\n"
    head("other")
    assert drive()[1] == "0\n1\n", "by now the bucket has it too"
    head("first")
    home.ledger.write_text("0\nWRONG\n")
    assert drive()[1] == "0\n1\n", "another driver's generation is newer"


def test_a_local_folder_of_a_study_that_is_no_more_is_emptied(bucket, head, monkeypatch):
    monkeypatch.setattr("medtune.storage.lease._SETTLE", 0.0)
    home = BucketHome(bucket, "s", 1.0)
    home.folder.mkdir(parents=True)
    (home.folder / "study.json").write_text('{"id": "s-0"}')
    (home.folder / "ledger.journal").write_text("of another\n")
    with home.driven(print):
        assert not home.ledger.exists() and not (home.folder / "study.json").exists()


