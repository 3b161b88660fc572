"""The local record, and the W&B run that a trial writes offline."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from medtune.tracking import (
    LocalRecord,
    WandbRun,
    earlier_epochs,
    read_epochs,
    read_events,
    read_final,
    read_outcome,
    run_id,
)
from tests.support.fake_wandb import FakeWandb
from tests.support.wandb_files import read
from tests.support.wandb_home import KEY, isolate
from tests.support.wandb_trial import line_of, play

pytestmark = pytest.mark.usefixtures("nobody")


def written(study, number, attempt=1):
    """What the file of an attempt holds."""
    found = [
        path
        for path in (study / "wandb").glob(f"offline-run-*-{number:04d}*/*.wandb")
        if json.loads(path.with_name("medtune.json").read_text())["attempt"] == attempt
    ]
    assert len(found) == 1
    return read(found[0])


class TestLocalRecord:
    def test_an_epoch_can_be_read_as_soon_as_it_is_recorded(self, tmp_path):
        record = LocalRecord(tmp_path / "attempt-1")
        assert read_epochs(record.folder) == []
        for epoch in (1, 2):
            record.epoch({"epoch": epoch, "metrics": {"val/loss": 0.5}})
            assert [line["epoch"] for line in read_epochs(record.folder)] == list(range(1, epoch + 1))

    def test_lines_are_strict_json(self, tmp_path):
        record = LocalRecord(tmp_path)
        values = {"nan": math.nan, "inf": np.float32("inf"), "f": np.float32(0.5), "i": np.int64(3), "t": (1, math.inf)}
        record.epoch(values | {"array": np.array([1.0, np.nan]), "none": None, "yes": True, "path": Path("x")})
        text = (tmp_path / "epochs.jsonl").read_text()
        assert text.count("\n") == 1
        line = json.loads(text, parse_constant=pytest.fail)
        assert line == {
            "nan": None,
            "inf": None,
            "f": 0.5,
            "i": 3,
            "t": [1, None],
            "array": [1.0, None],
            "none": None,
            "yes": True,
            "path": "x",
        }

    @pytest.mark.parametrize("cut", range(1, 14))
    def test_a_torn_last_line_is_left_out_and_the_next_stands_alone(self, tmp_path, cut):
        record = LocalRecord(tmp_path)
        record.epoch({"epoch": 1})
        record.epoch({"epoch": 2})
        path = tmp_path / "epochs.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        whole = [1, 2] if cut == 1 else [1]
        assert [line["epoch"] for line in read_epochs(tmp_path)] == whole
        LocalRecord(tmp_path).epoch({"epoch": 3})
        assert [line["epoch"] for line in read_epochs(tmp_path)] == [*whole, 3]

    def test_the_final_result_is_whole_or_absent(self, tmp_path):
        record = LocalRecord(tmp_path)
        (tmp_path / "final.json.part").write_text('{"status": "compl')
        assert read_final(tmp_path) is None
        record.final({"status": "complete", "value": math.nan})
        assert read_final(tmp_path) == {"status": "complete", "value": None}
        assert [path.name for path in tmp_path.iterdir()] == ["final.json"]

    def test_events_carry_their_time(self, tmp_path):
        LocalRecord(tmp_path).event("warning", message="low")
        (event,) = read_events(tmp_path)
        assert event["kind"] == "warning" and event["message"] == "low" and abs(event["time"] - time.time()) < 5

    def test_the_outcome_is_the_drivers(self, tmp_path):
        assert read_outcome(tmp_path) is None
        (tmp_path / "outcome.json").write_text('{"state": "PRUNED"}')
        assert read_outcome(tmp_path) == "PRUNED"

    def test_of_earlier_attempts_the_latest_word_on_each_epoch_counts(self, tmp_path):
        for attempt, epochs in ((1, (1, 2, 3)), (2, (3, 4)), (3, (5,)), (10, (6,))):
            for epoch in epochs:
                LocalRecord(tmp_path / f"attempt-{attempt}").epoch({"epoch": epoch, "attempt": attempt})
        found = [(line["epoch"], line["attempt"]) for line in earlier_epochs(tmp_path / "attempt-3")]
        assert found == [(1, 1), (2, 1), (3, 2), (4, 2)]
        assert [line["epoch"] for line in earlier_epochs(tmp_path / "attempt-11")] == [1, 2, 3, 4, 5, 6]
        assert earlier_epochs(tmp_path / "attempt-1") == []


def test_tracking_is_imported_without_wandb():
    code = "import sys, medtune.tracking, medtune.wandb_sync; sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Runs one after another in one process, as in a warm actor."""
    study = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, study / "home")
        # What a user may have set, none of which may reach the runs.
        for name, value in {"MODE": "disabled", "PROJECT": "other", "RUN_ID": "x", "SWEEP_ID": "s", "NAME": "n"}.items():
            patch.setenv(f"WANDB_{name}", value)
        play(study, 0, end="COMPLETE", pause=0.4)  # W&B's first look at the machine takes its time
        play(study, 1, last=2, end="PRUNED")
        play(study, 2, last=3, end="FAIL")
        play(study, 3, last=1, end="INTERRUPTED")
    return study


class TestWandbRun:
    def test_identity(self, study):
        run = written(study, 0).run
        assert (run.run_id, run.run_group, run.project) == ("st-1-0000", "st-1", "proj")
        assert run.display_name == "trial 0000 medmamba_t sgd"
        assert list(run.tags) == ["medmamba_t", "complete"]

    def test_full_configuration(self, study):
        config = written(study, 0).config
        assert {"model": "medmamba_t", "optimizer": "sgd", "lr": 0.001, "milestones": [0.25, 0.5]}.items() <= config.items()

    def test_one_row_an_epoch_with_epoch_as_step(self, study):
        run = written(study, 0)
        assert run.epochs == [1, 2, 3, 4] == [row["_step"] for row in run.history]
        assert run.history[1]["val/loss"] == 1.0 and run.history[1]["lr"] == 0.001
        assert "val/f1" not in run.history[1]
        assert run.step_metrics == {"epoch": "", "*": "epoch"}

    def test_external_tests_stand_at_their_epochs_with_their_curves(self, study):
        run = written(study, 0)
        assert [row.get("external/auc") for row in run.history] == [None, 0.2, None, 0.4]
        assert [row.get("external/epoch") for row in run.history] == [None, 2, None, 4]
        for name in ("external", "external_matched"):
            for kind in ("roc", "confusion"):
                table = run.history[3][f"curves/{name}/{kind}_table"]
                (file,) = (study / "wandb").glob(f"*-st-1-0000/files/{table['path']}")
                content = json.loads(file.read_text())
                assert f"curves/{name}/{kind}" in run.plots
                if kind == "roc":
                    assert content["columns"] == ["fpr", "tpr", "class"] and [0.1, 0.8, "pneumonia"] in content["data"]
                else:
                    assert ["pneumonia", "normal", 2] in content["data"] and len(content["data"]) == 4
        # Artifacts would get a version at each upload.
        assert "artifact" not in run.kinds

    @pytest.mark.parametrize(
        "number, state, code, rows",
        [(0, "COMPLETE", 0, 4), (1, "PRUNED", 0, 2), (2, "FAIL", 1, 3), (3, "INTERRUPTED", 1, 1)],
    )
    def test_end(self, study, number, state, code, rows):
        run = written(study, number)
        assert run.exit_code == code and len(run.history) == rows
        assert run.summary["state"] == state and list(run.run.tags)[-1] == state.lower()
        assert run.summary["best/val/loss"] == 2 / rows and run.summary["external/auc"] == 0.9
        assert run.summary["external/name"] == "played" and run.summary["external/epoch"] == rows
        assert ("preempting" in run.kinds) == (state == "INTERRUPTED")

    def test_system_metrics_are_of_this_machine_and_little_else_is_kept(self, study):
        run = written(study, 0)
        assert any("cpu" in name or "memory" in name for name in run.machine)
        files = {path.name for path in study.glob("wandb/*-0000/files/*")}
        assert not files & {"requirements.txt", "output.log", "code"}
        assert "output" not in run.kinds and "output_raw" not in run.kinds

    def test_nothing_went_wrong_on_the_way(self, study):
        assert list(study.glob("trials/*/*/events.jsonl")) == []


def test_run_ids_are_such_as_wandb_takes():
    assert run_id("medmamba-full-6b04d07b", 7) == "medmamba-full-6b04d07b-0007"
    odd = [run_id(name, 12345) for name in ("Lunge-\u00e4", "Lunge-\u00f6", "x" * 200 + "a", "x" * 200 + "b")]
    assert len(set(odd)) == 4
    assert all(len(name) <= 64 and re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in odd)


def test_runs_say_nothing_and_ask_nobody(tmp_path, nobody):
    """With a key and a server at hand: a trial still writes files alone, and neither prints nor reads."""
    with FakeWandb("silent") as server:
        nobody.setenv("WANDB_BASE_URL", server.url)
        nobody.setenv("WANDB_API_KEY", KEY)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            nobody.setenv(name, server.url)
        command = [sys.executable, "-m", "tests.support.wandb_trial", tmp_path, "7", "1", "1", "3", "0", "COMPLETE"]
        started = time.monotonic()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert time.monotonic() - started < 30
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert server.requests == []
    assert written(tmp_path, 7).epochs == [1, 2, 3]


def test_an_attempt_begins_with_the_epochs_of_those_before(tmp_path):
    """The first was killed before W&B wrote anything; its epochs come from the local record, tests included."""
    first = LocalRecord(tmp_path / "trials" / "0005" / "attempt-1")
    tested = {"epoch": 2, "external/auc": 0.2, "external/name": "played"}
    for epoch in (1, 2, 3):
        first.epoch(line_of(epoch, tested if epoch > 1 else None))
    play(tmp_path, 5, attempt=2, first=3, last=5)
    run = written(tmp_path, 5, attempt=2)
    assert run.epochs == [1, 2, 3, 4, 5] == [row["_step"] for row in run.history]
    assert [row.get("external/auc") for row in run.history] == [None, 0.2, None, 0.4, None]
    assert [row["val/loss"] for row in run.history] == [2 / epoch for epoch in range(1, 6)]


def test_an_attempt_that_has_only_the_test_left(tmp_path):
    record = LocalRecord(tmp_path / "trials" / "0006" / "attempt-1")
    for epoch in (1, 2):
        record.epoch(line_of(epoch))
    play(tmp_path, 6, attempt=2, first=3, last=2)
    record = LocalRecord(tmp_path / "trials" / "0006" / "attempt-3")
    run = WandbRun("st-1", 6, 3, {}, tmp_path / "wandb", record=record)
    run.external({"epoch": 2, "external/auc": 0.7}, {})
    run.finish("COMPLETE", {})
    assert written(tmp_path, 6, attempt=2).epochs == [1, 2]
    assert [(row["epoch"], row.get("external/auc")) for row in written(tmp_path, 6, 3).history] == [
        (1, None),
        (2, None),
        (2, 0.7),
    ]


def services():
    """wandb-core processes of this one."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


class TestTroubleWithWandb:
    def test_a_start_that_fails_is_a_warning(self, tmp_path, monkeypatch):
        import wandb

        monkeypatch.setattr(wandb, "init", lambda **given: 1 / 0)
        run = play(tmp_path, 0)
        assert not run.active
        record = tmp_path / "trials" / "0000" / "attempt-1"
        assert len(read_epochs(record)) == 4
        assert "ZeroDivisionError" in read_events(record)[-1]["message"]

    def test_an_error_in_the_middle_turns_it_off_for_this_attempt_alone(self, tmp_path, monkeypatch):
        import wandb

        with monkeypatch.context() as patch:
            patch.setattr(wandb.Run, "log", lambda self, *given, **more: os.stat("/nowhere"))
            play(tmp_path, 1)
        record = tmp_path / "trials" / "0001" / "attempt-1"
        assert len(read_epochs(record)) == 4
        (event,) = read_events(record)
        assert event["kind"] == "warning" and "FileNotFoundError" in event["message"]
        play(tmp_path, 2)
        assert written(tmp_path, 2).epochs == [1, 2, 3, 4]

    def test_a_service_that_died_is_started_again(self, tmp_path):
        play(tmp_path, 3)
        for pid in services():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        play(tmp_path, 4)
        assert written(tmp_path, 4).epochs == [1, 2, 3, 4]

    def test_a_service_that_hangs_costs_a_set_time_once(self, tmp_path, monkeypatch):
        play(tmp_path, 6)
        monkeypatch.setattr("medtune.wandb_run.LONGEST_SECONDS", 0.5)
        stopped = services()
        assert stopped
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        monkeypatch.setattr("medtune.wandb_run._hangs", threading.Event())
        for number, message in ((7, "no answer"), (8, "hangs")):
            play(tmp_path, number)
            record = tmp_path / "trials" / f"{number:04d}" / "attempt-1"
            assert len(read_epochs(record)) == 4
            assert message in read_events(record)[-1]["message"]
        assert time.monotonic() - started < 2
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)

    def test_a_folder_that_cannot_be_written_is_a_warning(self, tmp_path):
        (tmp_path / "wandb").write_text("a file")
        play(tmp_path, 5)
        assert len(read_epochs(tmp_path / "trials" / "0005" / "attempt-1")) == 4

    def test_off_writes_nothing(self, tmp_path):
        run = WandbRun("st-1", 0, 1, {}, tmp_path / "wandb", mode="off")
        run.epoch({"epoch": 1})
        run.external({}, {})
        run.finish("COMPLETE", {})
        assert list(tmp_path.iterdir()) == []
