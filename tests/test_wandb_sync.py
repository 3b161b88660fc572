"""Uploading: what arrives at the server, and that a server in any state costs the study nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from medtune.wandb_env import KeyRefused, ServerUnreachable, TrackingError, base_url, find_account, user_says_offline
from medtune.wandb_sync import Uploader, sync
from tests.support.fake_wandb import FakeWandb, refusing_url
from tests.support.wandb_home import KEY, isolate
from tests.support.wandb_trial import play

pytestmark = pytest.mark.usefixtures("nobody")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study of which nothing was uploaded: trial 0 complete, 1 pruned, 2 in its second attempt."""
    study = tmp_path_factory.mktemp("written") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, study / "home")
        play(study, 0)
        play(study, 1, last=2, end="PRUNED")
        play(study, 2, attempt=1, last=3, end="INTERRUPTED")
        play(study, 2, attempt=2, first=3, last=5)
    return study


@pytest.fixture
def study(written, tmp_path):
    return shutil.copytree(written, tmp_path / "demo")


@contextmanager
def server(nobody, mode="ok", **more):
    with FakeWandb(mode, **more) as wandb:
        nobody.setenv("WANDB_BASE_URL", wandb.url)
        nobody.setenv("WANDB_API_KEY", KEY)
        yield wandb


def quiet(line):
    pass


def uploaded(study):
    return {path.parent.name[-4:] for path in study.glob("wandb/*/uploaded.json")}


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class TestAccount:
    def test_without_a_key_there_is_no_account(self):
        assert find_account() is None

    def test_the_official_server_unless_the_user_says_otherwise(self, nobody, tmp_path):
        assert base_url() == "https://api.wandb.ai"
        nobody.setenv("WANDB_CONFIG_DIR", str(tmp_path))
        (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.here/\nmode = offline\n")
        assert base_url() == "https://wandb.here" and user_says_offline()
        nobody.setenv("WANDB_BASE_URL", "http://localhost:8080")
        assert base_url() == "http://localhost:8080"
        nobody.setenv("WANDB_MODE", "online")
        assert not user_says_offline()

    def test_key_of_the_environment_first(self, nobody, tmp_path):
        (tmp_path / "netrc").write_text("machine api.wandb.ai\n login user\n password fromnetrc\n")
        nobody.setenv("NETRC", str(tmp_path / "netrc"))
        account = find_account()
        assert (account.url, account.key) == ("https://api.wandb.ai", "fromnetrc")
        nobody.setenv("WANDB_API_KEY", "fromenv")
        assert find_account().key == "fromenv"

    @pytest.mark.parametrize(
        "machine, url, found",
        [
            ("api.forge.coreweave.com", None, True),
            ("api.wandb.ai", "https://api.forge.coreweave.com", True),
            ("api.wandb.ai", "https://wandb.here", False),
            ("wandb.here:8080", "http://wandb.here:8080", True),
        ],
    )
    def test_a_key_opens_the_server_it_was_stored_for(self, nobody, tmp_path, machine, url, found):
        (tmp_path / "netrc").write_text(f"default login a password b\nmachine {machine}\n login user\n password k\n")
        (tmp_path / "netrc").write_text(f"machine {machine}\n login user\n password k\ndefault login a password b\n")
        nobody.setenv("NETRC", str(tmp_path / "netrc"))
        if url:
            nobody.setenv("WANDB_BASE_URL", url)
        account = find_account()
        assert (account.key == "k") if found else account is None

    def test_a_damaged_netrc_is_no_key(self, nobody, tmp_path):
        (tmp_path / "netrc").write_text("machine\n%%%\x00")
        nobody.setenv("NETRC", str(tmp_path / "netrc"))
        assert find_account() is None

    def test_the_key_is_not_shown(self, nobody):
        nobody.setenv("WANDB_API_KEY", "secret")
        assert "secret" not in repr(find_account())


class TestSync:
    def test_everything_arrives_once(self, nobody, study):
        said = []
        nobody.chdir(study.parent)
        with server(nobody) as wandb:
            report = sync(Path("demo"), said.append)
            assert report.ok and sorted(report.uploaded) == [0, 1, 2], report.describe()
            calls = len(wandb.requests)
            again = sync(study, said.append)
            assert len(wandb.requests) == calls and again.ok and again.uploaded == []
        assert "3 runs to upload" in said[0] and "(3 of 3)" in said[3] and len(said) == 4
        assert "all runs were uploaded before" in again.describe()
        assert wandb.keys == {f"api:{KEY}"}
        assert set(wandb.runs) == {"st-1-0000", "st-1-0001", "st-1-0002"}
        run = wandb.runs["st-1-0000"]
        assert (run.project, run.group, run.display_name) == ("proj", "st-1", "trial 0000 medmamba_t sgd")
        assert set(run.tags) == {"medmamba_t", "complete"}
        assert run.settings["lr"] == 0.001 and run.settings["milestones"] == [0.25, 0.5]
        assert [row["epoch"] for row in run.history] == [1, 2, 3, 4]
        assert run.summary["external/auc"] == 0.9 and run.summary["state"] == "COMPLETE"
        assert run.complete and run.exit_code == 0
        pruned = wandb.runs["st-1-0001"]
        assert pruned.exit_code == 0 and pruned.summary["state"] == "PRUNED"
        # Both attempts of trial 2, its first three epochs from the second attempt's file.
        assert [row["epoch"] for row in wandb.runs["st-1-0002"].history] == [1, 2, 3, 4, 5]
        tables = [path for method, path in wandb.requests if method == "PUT" and "curves/external/roc" in path]
        assert len(tables) == 4
        # Nothing that only some servers know, and nothing about the machine's user.
        assert not any("Artifact" in operation for _, operation in wandb.requests)

    def test_an_attempt_uploaded_after_another_goes_on_in_its_run(self, nobody, tmp_path):
        play(tmp_path, 0, attempt=1, last=4, end="INTERRUPTED")
        with server(nobody) as wandb:
            assert sync(tmp_path, quiet).ok
            assert [row["epoch"] for row in wandb.runs["st-1-0000"].history] == [1, 2, 3, 4]
            play(tmp_path, 0, attempt=2, first=4, last=6)
            # A trial's process forgets what W&B was told, and this is one.
            nobody.setenv("WANDB_BASE_URL", wandb.url)
            nobody.setenv("WANDB_API_KEY", KEY)
            assert sync(tmp_path, quiet).ok
        run = wandb.runs["st-1-0000"]
        assert [(row["_step"], row["epoch"]) for row in run.history] == [(n, n) for n in range(1, 7)]
        assert run.summary["state"] == "COMPLETE" and run.exit_code == 0

    def test_without_a_key_nothing_is_contacted_and_the_way_out_is_named(self, nobody, study):
        with server(nobody) as wandb:
            nobody.delenv("WANDB_API_KEY")
            with pytest.raises(TrackingError, match=r"no W&B key for http://127.*wandb login.*medtune sync .*demo"):
                sync(study, quiet)
            assert wandb.requests == []

    def test_a_study_without_runs(self, nobody, tmp_path):
        nobody.setenv("WANDB_API_KEY", KEY)
        with pytest.raises(TrackingError, match="--wandb off"):
            sync(tmp_path, quiet)

    def test_servers_that_take_nothing_are_named_at_once(self, nobody, study):
        started = time.monotonic()
        with server(nobody, "unauthorized"), pytest.raises(KeyRefused, match="refuses the key"):
            sync(study, quiet)
        with server(nobody, "error"), pytest.raises(ServerUnreachable, match=r"HTTP 500.*Nothing is lost"):
            sync(study, quiet)
        nobody.setenv("WANDB_BASE_URL", refusing_url())
        with pytest.raises(ServerUnreachable, match="Connection refused"):
            sync(study, quiet)
        assert time.monotonic() - started < 30
        assert uploaded(study) == set()

    def test_a_run_that_the_server_does_not_take_is_named_and_taken_later(self, nobody, study):
        """wandb itself marks such a run as synced, and does not say that files of it are missing."""
        for run in study.glob("wandb/*-000[02]*"):
            shutil.rmtree(run)
        with server(nobody) as wandb:
            for mode in ("stream-error", "file-error"):
                wandb.mode = mode
                report = sync(study, quiet)
                assert not report.ok and report.uploaded == [] and report.left == ["st-1-0001"]
                assert "500" in report.describe() and f"`medtune sync {study}`" in report.describe()
                assert uploaded(study) == set()
            wandb.mode = "ok"
            assert sync(study, quiet).ok
            assert [row["epoch"] for row in wandb.runs["st-1-0001"].history] == [1, 2]

    def test_a_run_that_is_being_written_is_left_for_later(self, nobody, study):
        (mark,) = study.glob("wandb/*-0001/medtune.json")
        values = json.loads(mark.read_text())
        mark.write_text(json.dumps({k: v for k, v in values.items() if k != "state"}))
        os.utime(next(mark.parent.glob("*.wandb")))
        with server(nobody) as wandb:
            report = sync(study, quiet)
            assert sorted(report.uploaded) == [0, 2] and report.ok and report.running == ["st-1-0001"]
            assert "1 run still being written" in report.describe()
            # Long after the last word of its process it counts as killed.
            past = time.time() - 1000
            os.utime(next(mark.parent.glob("*.wandb")), (past, past))
            assert sync(study, quiet).uploaded == [1]
            assert sync(study, quiet).uploaded == []
        assert [row["epoch"] for row in wandb.runs["st-1-0001"].history] == [1, 2]


class TestUploader:
    @pytest.mark.parametrize(
        "mode, key, said, reason",
        [
            ("auto", None, None, "no W&B key"),
            ("auto", KEY, "offline", "kept offline"),
            ("offline", KEY, None, "kept offline"),
            ("off", KEY, None, "off"),
        ],
    )
    def test_nothing_is_started_where_nothing_is_to_be_uploaded(self, nobody, study, mode, key, said, reason):
        with server(nobody) as wandb:
            nobody.delenv("WANDB_API_KEY") if key is None else None
            nobody.setenv("WANDB_MODE", said) if said else None
            with Uploader(study, mode) as uploader:
                assert not uploader.running and reason in uploader.describe()
                time.sleep(0.2)
            assert wandb.requests == []

    def test_epochs_are_seen_while_the_trial_runs_also_those_of_a_second_attempt(self, nobody, tmp_path):
        """The first attempt is killed."""
        command = [sys.executable, "-m", "tests.support.wandb_trial", tmp_path, "0"]
        with server(nobody) as wandb, Uploader(tmp_path) as uploader:
            run = wandb.runs.get
            first = subprocess.Popen([*command, "1", "1", "400", "0.1", "COMPLETE"])
            until(lambda: run("st-1-0000") is not None and run("st-1-0000").history, 40)
            first.send_signal(signal.SIGKILL)
            first.wait()
            seen = len(run("st-1-0000").history)
            assert not run("st-1-0000").complete
            recorded = (tmp_path / "trials/0000/attempt-1/epochs.jsonl").read_text().count("\n")
            last = recorded + 3
            play(tmp_path, 0, attempt=2, first=recorded, last=last)
            until(lambda: run("st-1-0000").complete)
            report = uploader.stop(20)
        assert seen <= recorded
        assert [(row["_step"], row["epoch"]) for row in run("st-1-0000").history] == [
            (epoch, epoch) for epoch in range(1, last + 1)
        ]
        assert report.ok and report.uploaded == [0], report.describe()

    def test_what_has_ended_is_uploaded_at_the_end(self, nobody, study):
        with server(nobody) as wandb:
            uploader = Uploader(study)
            uploader.start()
            report = uploader.stop(20)
            assert report.ok and sorted(report.uploaded) == [0, 1, 2], report.describe()
        assert len(wandb.runs) == 3

    def test_a_second_uploader_keeps_out(self, nobody, study):
        with server(nobody), Uploader(study) as uploader:
            until(lambda: len(uploader.report.uploaded) == 3)
            (study / "wandb" / "offline-run-x").mkdir()
            shutil.copy(next(study.glob("wandb/*-0000/*.wandb")), study / "wandb" / "offline-run-x" / "run-new.wandb")
            past = time.time() - 1000
            os.utime(study / "wandb" / "offline-run-x" / "run-new.wandb", (past, past))
            with pytest.raises(TrackingError, match="another process is uploading"):
                sync(study, quiet)

    @pytest.mark.parametrize("mode", ["refused", "error", "unauthorized"])
    def test_a_server_that_fails_costs_nothing(self, nobody, study, mode):
        said = []
        with server(nobody, "ok" if mode == "refused" else mode):
            if mode == "refused":
                nobody.setenv("WANDB_BASE_URL", refusing_url())
            uploader = Uploader(study, say=said.append)
            uploader.start()
            until(lambda: said)
            started = time.monotonic()
            report = uploader.stop(20)
            assert time.monotonic() - started < 2
        assert len(said) == 1 and "the study goes on" in said[0]
        assert not report.ok and len(report.left) == 3 and f"`medtune sync {study}`" in report.describe()

    def test_a_server_that_says_nothing_costs_the_time_allowed_at_most(self, nobody, study):
        with server(nobody, "silent") as wandb:
            uploader = Uploader(study)
            uploader.start()
            until(lambda: wandb.requests)
            started = time.monotonic()
            report = uploader.stop(4)
            assert time.monotonic() - started < 4.5
        assert len(report.left) == 3

    def test_a_server_that_goes_silent_in_the_middle_costs_the_time_allowed_at_most(self, nobody, study):
        with server(nobody, "slow", delay=0.3) as wandb:
            uploader = Uploader(study)
            uploader.start()
            until(lambda: wandb.operations("UpsertBucket"))
            wandb.mode = "silent"
            started = time.monotonic()
            report = uploader.stop(3)
            assert time.monotonic() - started < 3.5
        assert report.left and not report.ok

    def test_a_server_that_takes_nothing_more_is_not_waited_for(self, nobody, study):
        with server(nobody, "stream-error") as wandb:
            uploader = Uploader(study, say=quiet)
            uploader.start()
            until(lambda: sum("file_stream" in operation for _, operation in wandb.requests) >= 6)
            time.sleep(1)
            started = time.monotonic()
            report = uploader.stop(20)
            assert time.monotonic() - started < 5
        assert len(report.left) == 3

    def test_it_goes_on_when_the_server_is_back(self, nobody, study, monkeypatch):
        with server(nobody, "stream-error") as wandb:
            uploader = Uploader(study, say=quiet)
            uploader.start()
            until(lambda: any("file_stream" in operation for _, operation in wandb.requests))
            wandb.mode = "ok"
            until(lambda: len(uploader.report.uploaded) == 3, 40)
            assert uploader.stop().ok

    def test_it_dies_with_its_driver(self, nobody, study, tmp_path):
        code = (
            "import sys, time; from pathlib import Path; from medtune.wandb_sync import Uploader;"
            "u = Uploader(Path(sys.argv[1])); u.start(); print(u._engine._process.pid, flush=True); time.sleep(60)"
        )
        with server(nobody):
            driver = subprocess.Popen([sys.executable, "-c", code, study], stdout=subprocess.PIPE, text=True)
            engine = int(driver.stdout.readline())
            until(lambda: len(uploaded(study)) == 3)
            found = subprocess.run(["pgrep", "-P", str(engine)], capture_output=True, text=True)
            children = [int(pid) for pid in found.stdout.split()]
            assert children
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            until(lambda: gone(engine) and all(gone(pid) for pid in children), 10)

    def test_an_uploader_that_breaks_costs_nothing(self, nobody, study):
        said = []
        with server(nobody):
            nobody.setenv("PYTHONHOME", "/nowhere")
            uploader = Uploader(study, say=said.append)
            uploader.start()
            until(lambda: not uploader.running)
            report = uploader.stop()
        assert len(report.left) == 3 and "upload.log" in said[0]
