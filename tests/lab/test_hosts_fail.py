"""Hosts that are cut off, killed and resumed from, under a study of real trainings: every trial is accounted for."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medtune.results import Study, load_study
from medtune.search.conductor import attempt_folder
from medtune.tracking import read_epochs, read_events
from tests.lab.hosts import Lab, address, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

TRIALS = "ray::.*(Trainable|MedtuneTrial)"
"""A trial's process: by what it does while it takes a step, by its class between two."""
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
ENV = {"MEDTUNE_STORAGE": "/mnt/shared/studies", "OMP_NUM_THREADS": "1"}
# A W&B server that is not there, and a key: nothing may wait for it.
WANDB = {"WANDB_BASE_URL": f"http://{address('w4')}:8080", "WANDB_API_KEY": "0" * 40}
STUDY = (
    "cd medtune && python sweeps/report.py --preset laptop --model medmamba_t --pair synthetic "
    "--seeds 3 --epochs 8 --train-limit 64 --external-limit 32 --resamples 0 --checkpoint-seconds 3 --trials 3"
)


@pytest.fixture(scope="module")
def lab(lab_ground: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A head that trains nothing, and two workers."""
    with Lab(tmp_path_factory.mktemp("lab"), hosts=("head", "w1", "w2")) as lab:
        lab.install("head", "w1", "w2")
        for host in ("head", "w1", "w2"):
            token = lab.disk(host, "/root/.ray/auth_token")
            token.parent.mkdir()
            token.write_text("0" * 64)
            token.chmod(0o600)
        start_head(lab, "head", cpus=0)
        join(lab, "w1")
        join(lab, "w2")
        yield lab


def start_head(lab: Lab, host: str, cpus: int) -> None:
    at = f"--port=6379 --node-ip-address={address(host)} --num-cpus={cpus} --object-store-memory=100000000"
    lab.run(host, f"ray start --head {at} --include-dashboard=false", env={**ENV, **HEALTH})


def join(lab: Lab, host: str, head: str = "head") -> None:
    at = f"--address={address(head)}:6379 --node-ip-address={address(host)}"
    lab.run(host, f"ray start {at} --num-cpus=2 --object-store-memory=100000000", env=ENV)


def drive(lab: Lab, host: str, flags: str = "", **env: str) -> subprocess.Popen[str]:
    log = open(lab.folder / "driver.log", "a")  # noqa: SIM115 until the driver ends
    return lab.popen(host, f"{STUDY} {flags}", env={**ENV, **env}, stdout=log, stderr=log)


def said(lab: Lab) -> str:
    return (lab.folder / "driver.log").read_text()


def folder(lab: Lab, name: str) -> Path:
    return lab.shared / "studies" / name


def study(lab: Lab, name: str) -> Study:
    return load_study(str(folder(lab, name)))


def reports(lab: Lab, name: str, number: int, attempt: int = 1) -> list[dict[str, Any]]:
    return [line["report"] for line in read_epochs(attempt_folder(folder(lab, name) / "trials", number, attempt))]


def trained_on(lab: Lab, name: str, host: str, epochs: int) -> list[int]:
    """Trials that were trained on a host for that many epochs at least."""
    found = []
    for number in range(3):
        seen = reports(lab, name, number)
        if len(seen) >= epochs and seen[-1]["node"] == host:
            found.append(number)
    return found


def finish(lab: Lab, driver: subprocess.Popen[str], seconds: float = 420) -> None:
    assert driver.wait(timeout=seconds) == 0, said(lab)


def accounted_for(lab: Lab, name: str) -> Study:
    """Every trial was trained to its end once, and its figures are those of the attempt that counts."""
    found = study(lab, name)
    assert [(row.number, row.state, row.epoch) for row in found.rows] == [(n, "COMPLETE", 8) for n in range(3)]
    for row in found.rows:
        home = folder(lab, name) / "trials" / f"{row.number:04d}"
        final = json.loads((home / f"attempt-{row.attempt}" / "final.json").read_text())
        assert final["value"] == row.value and final["best"] == row.latest["best"]
        assert json.loads((home / "current.json").read_text()) == {"attempt": row.attempt}
    return found


def figures(found: Study) -> list[Any]:
    return [(row.settings, row.value, row.latest["best"], row.latest["external"]) for row in found.rows]


@pytest.fixture(scope="module")
def cut(lab: Lab) -> Study:
    """A study during which w1 is cut off the network, and healed after a minute."""
    driver = drive(lab, "head", "--name cut", **WANDB)
    (*_, lost) = wait_until(lambda: driver.poll() is None and trained_on(lab, "cut", "w1", 2), 180, "a trial on w1")
    train = lab.pids("w1", TRIALS)
    assert len(train) >= len(trained_on(lab, "cut", "w1", 1))
    began = time.monotonic()
    lab.cut("w1")
    wait_until(lambda: study(lab, "cut").rows[lost].faults, 15, "w1 to be found gone")
    found = time.monotonic() - began
    one_there = f"ls -d {' '.join(f'/proc/{pid}' for pid in train)} | grep proc"
    wait_until(lambda: lab.run("w1", one_there, check=False).returncode, 60 - found, "w1's processes to end", 1.0)
    ended = time.monotonic() - began
    said_why = read_events(attempt_folder(folder(lab, "cut") / "trials", lost, 1))
    print(f"w1 was found gone after {found:.1f} s; its processes ended after {ended:.1f} s: {said_why}")
    assert [event["kind"] for event in said_why] == ["cut off"]
    lab.heal("w1")
    finish(lab, driver)
    return study(lab, "cut")


def test_a_host_is_cut_off_and_healed(lab: Lab, cut: Study) -> None:
    found = accounted_for(lab, "cut")
    again = [row for row in found.rows if row.attempt > 1]
    # A launch that was placed on w1 before it was found gone is taken back at no charge.
    assert again and all(1 <= row.faults <= row.attempt - 1 and not row.errors for row in again)
    for row in again:
        first, second = reports(lab, "cut", row.number), reports(lab, "cut", row.number, row.attempt)
        assert row.latest["node"] != "w1" or len(first) == 8
        assert second[0]["epoch"] > 1, "it went on from a checkpoint"


def test_the_images_came_to_each_node_once(lab: Lab, cut: Study) -> None:
    for host in ("w1", "w2"):
        (pack,) = (path for path in lab.disk(host, "/root/.cache/medtune/packs").iterdir() if path.is_dir())
        assert (pack / "about.json").exists()


def test_a_driver_is_killed_and_another_node_resumes(lab: Lab, cut: Study) -> None:
    if not lab.pids("w1", "raylet/raylet"):
        lab.run("w1", "ray stop --force")
        join(lab, "w1")
    drive(lab, "head", "--name driver")
    wait_until(lambda: trained_on(lab, "driver", "w2", 2), 180, "a trial on w2")
    assert lab.kill_process("head", "sweeps/report.py")
    finish(lab, drive(lab, "w2", "--name driver --resume"))
    assert figures(accounted_for(lab, "driver")) == figures(cut)
    wrong = lab.run("w2", f"{STUDY} --name drivr --resume", env=ENV, check=False)
    assert wrong.returncode == 2 and "Did you mean 'driver'" in wrong.stderr


def test_the_head_is_killed_and_a_new_one_resumes(lab: Lab, cut: Study) -> None:
    drive(lab, "head", "--name head")
    wait_until(lambda: trained_on(lab, "head", "w2", 2), 180, "a trial on w2")
    lab.kill_host("head")
    lab.run("w1", "ray stop --force")
    start_head(lab, "w1", cpus=2)
    lab.run("w2", "ray stop --force")
    join(lab, "w2", "w1")
    finish(lab, drive(lab, "w1", "--name head --resume"))
    assert figures(accounted_for(lab, "head")) == figures(cut)
