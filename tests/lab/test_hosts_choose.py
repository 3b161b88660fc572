"""`ray submit cluster.yaml sweeps/choose.py`: finalists are trained on all hosts; driver and a worker die in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medtune.choose import read_choice
from medtune.choose.stage import open_stage
from medtune.results import load_study
from medtune.search.conductor import attempt_folder
from medtune.tracking import read_epochs
from tests.lab.hosts import Lab, wait_until
from tests.lab.launcher import SMALL, ray_up, submit

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

STORAGE = "/mnt/shared/studies"
STUDY = f"{SMALL} --epochs 8 --trials 2 --first-rung 1 --storage {STORAGE} --name day"
CHOOSE = f"day --top 2 --seeds 3 --checkpoint-seconds 0 --storage {STORAGE}"
SCRIPT = "sweeps/choose.py"


@pytest.fixture(scope="module")
def cluster(lab_ground, tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.install("cli")
        ray_up(lab)
        yield lab


def recorded(stage: Path, number: int, attempt: int) -> list[dict[str, Any]]:
    return read_epochs(attempt_folder(stage / "trials", number, attempt))


def trained_on(stage: Path, host: str) -> tuple[int, int] | None:
    """A training's number and attempt that is in the middle on a host."""
    for path in sorted(stage.glob("trials/*/attempt-*")):
        number, attempt = int(path.parent.name), int(path.name.removeprefix("attempt-"))
        lines = recorded(stage, number, attempt)
        if len(lines) >= 2 and lines[-1]["epoch"] <= 5 and lines[-1]["report"]["node"] == host:
            return number, attempt
    return None


@pytest.fixture(scope="module")
def day(cluster):
    """What was seen in the course of a study and its choice."""
    seen: dict[str, Any] = {}
    stage = cluster.shared / "studies" / "day" / "stages" / "finalists"
    assert submit(cluster, STUDY).wait(timeout=300) == 0
    first = submit(cluster, CHOOSE, SCRIPT)
    wait_until(lambda: list(stage.glob("trials/*/attempt-1/epochs.jsonl")), 180, "a first epoch")
    assert cluster.kill_process("head", "choose.py")
    first.wait(timeout=60)
    seen["killed driver"] = json.loads((stage / "driver.json").read_text())
    second = submit(cluster, CHOOSE, SCRIPT)
    seen["interrupted"] = wait_until(lambda: trained_on(stage, "w1"), 180, "a training on w1")
    assert cluster.kill_process("w1", "raylet/raylet")
    second.wait(timeout=400)
    seen["said"] = cluster.disk("cli", "/root/submit.log").read_text()
    third = submit(cluster, CHOOSE, SCRIPT)
    third.wait(timeout=100)
    seen["again"] = cluster.disk("cli", "/root/submit.log").read_text()
    return seen


def test_every_finalist_has_every_seed_and_hosts_shared_the_work(day, cluster):
    study = load_study("day", cluster.shared / "studies")
    stage, choice = open_stage(study), read_choice(study)
    assert [row.state for row in stage.rows] == ["COMPLETE"] * 6
    assert len({row.latest["node"] for row in stage.rows}) > 1
    assert [len(one["runs"]) for one in choice["finalists"]] == [3, 3]
    for row in stage.rows:
        lines = [line["epoch"] for n in range(1, row.attempt + 1) for line in recorded(stage.folder, row.number, n)]
        assert set(lines) == set(range(1, 9)) and len(lines) - 8 <= row.attempt - 1, "an epoch for each interruption at most"


def test_the_training_whose_process_died_went_on_and_was_no_error(day, cluster):
    stage = open_stage(load_study("day", cluster.shared / "studies"))
    number, attempt = day["interrupted"]
    row = stage.rows[number]
    before, after = recorded(stage.folder, number, attempt), recorded(stage.folder, number, row.attempt)
    assert row.attempt > attempt and row.faults >= 1 and not row.errors
    assert len(before) < 8 and after[0]["epoch"] > 1


def test_the_outcome_is_printed_and_recorded(day, cluster):
    stage = cluster.shared / "studies" / "day" / "stages" / "finalists"
    record = json.loads((stage / "driver.json").read_text())
    assert day["killed driver"]["state"] == "running"
    assert (record["state"], record["status"], record["host"]) == ("ended", 0, "head")
    assert record["message"].startswith("chosen: trial ")
    log = (stage / "driver.log").read_text()
    assert "finalists by val/loss" in log and log.rstrip().endswith(record["message"])
    for said in (day["said"], day["again"]):
        assert "chosen: trial " in said and "finalists by val/loss" in said
    assert "going on with" in day["said"] and "RUNNING" not in day["again"], "what is trained is not trained again"
