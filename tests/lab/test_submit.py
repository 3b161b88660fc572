"""A user's day: `ray up`, `ray submit`; the client goes, a machine's Ray dies, and nothing is lost and no key is told."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from medtune.record import earlier_epochs
from medtune.results import load_study
from tests.lab.hosts import Lab, wait_until, why_not
from tests.lab.launcher import SMALL, alive, ray_up, submit

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

WANDB_KEY = "5ec2e7" * 6 + "abcd"
S3_SECRET = "s3secret/" + "Q7" * 12
STORAGE = "/mnt/shared/studies"
TRIALS = 8
# Longer than a second driver waits for the first, which is ten seconds, on cores that have nothing else to do as well.
STUDY = f"{SMALL} --epochs 6 --trials {TRIALS} --storage {STORAGE} --name day"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.install("cli")
        # Where cluster/README.md has it, and there before Ray starts: Ray itself has the keys in its environment then.
        keys = f"export WANDB_API_KEY={WANDB_KEY} AWS_ACCESS_KEY_ID=someone AWS_SECRET_ACCESS_KEY={S3_SECRET}\n"
        lab.disk("head", "/root/.medtune-keys").write_text(keys)
        ray_up(lab)
        yield lab


@pytest.fixture(scope="module")
def folder(cluster):
    return cluster.shared / "studies" / "day"


@pytest.fixture(scope="module")
def day(cluster, folder):
    """One study; what was seen in the course of it."""
    seen = {}
    submit(cluster, STUDY)
    wait_until(lambda: list(folder.glob("trials/*/attempt-1/epochs.jsonl")), 120, "a first epoch")
    # The user's machine goes: every process of it that has to do with the cluster, at once.
    for pattern in ("script -qefc", "ray submit", "ssh -tt", "ray_ssh"):
        cluster.kill_process("cli", pattern, signal.SIGKILL)
    assert cluster.pids("cli", "ssh -tt") == [] == cluster.pids("cli", "ray_ssh")
    again = submit(cluster, STUDY)
    again.wait(timeout=60)
    seen["second submit"] = cluster.disk("cli", "/root/submit.log").read_text()
    seen["busy"] = cluster.run("head", f"medtune studies --json --storage {STORAGE}").stdout
    seen["killed"] = cluster.kill_process("w1", "raylet/raylet")
    wait_until(lambda: json.loads((folder / "driver.json").read_text())["state"] != "running", 400, "the study's end")
    return seen


def test_every_trial_is_accounted_for_although_a_raylet_was_killed(day, folder):
    assert day["killed"], "there was a raylet to kill"
    rows = load_study(str(folder)).rows
    assert [row.number for row in rows] == list(range(TRIALS))
    assert {row.state for row in rows} <= {"COMPLETE", "PRUNED"} and any(row.state == "COMPLETE" for row in rows)
    for row in rows:
        home = folder / "trials" / f"{row.number:04}"
        assert len(earlier_epochs(home / f"attempt-{row.attempt + 1}")) >= row.epoch, "its own record has what was told"
        assert row.state == "PRUNED" or json.loads((home / f"attempt-{row.attempt}" / "final.json").read_text())
    nodes = {row.latest["node"] for row in rows}
    assert len(nodes) > 1, f"trials ran on {nodes} alone"
    assert sum(row.faults for row in rows) <= 1, "one process at most was lost: the node had one CPU"


def test_the_driver_outlived_its_client_and_left_its_outcome(day, folder, cluster):
    record = json.loads((folder / "driver.json").read_text())
    log = (folder / "driver.log").read_text()
    assert (record["state"], record["status"], record["host"]) == ("ended", 0, "head"), log[-4000:]
    assert record["message"].startswith("best: trial ")
    assert "best configuration: trial" in log and log.rstrip().endswith(record["message"])
    said = cluster.run("head", f"medtune studies --json --storage {STORAGE}").stdout
    assert json.loads(said)[0]["driver"]["status"] == 0


def test_a_second_submit_names_the_driver_and_its_log(day):
    said = " ".join(day["second submit"].split())
    assert "is being run by another process" in said and f"tail -f {STORAGE}/day/driver.log" in said
    assert json.loads(day["busy"])[0]["running"]


def test_the_driver_had_the_keys(day, folder):
    """Else the search below would find nothing whatever was done."""
    assert "api.wandb.ai does not answer" in (folder / "driver.log").read_text(), "with a key, uploads are tried"


def test_no_key_stands_anywhere_but_where_the_user_put_it(day, cluster):
    """In YAMLs, Ray's saved configuration, logs and sessions of all hosts, the ledger, the records, the driver's log."""
    places = [cluster.folder / "disks", cluster.shared]
    for secret in (WANDB_KEY, S3_SECRET):
        found = subprocess.run(["grep", "-rlaF", "--exclude-dir=.venv", secret, *places], capture_output=True, text=True)
        assert found.stdout.split() == [str(cluster.disk("head", "/root/.medtune-keys"))]
    searched = [cluster.disk(host, "/tmp/ray") for host in ("head", "w1", "w2")]
    searched += [cluster.disk("head", "/root/ray_bootstrap_config.yaml"), cluster.shared / "studies/day/ledger.journal"]
    assert all(path.exists() for path in searched), "the search must have had something to search"


def test_code_edited_after_ray_up_is_found_and_one_command_renews_it_everywhere(cluster):
    script = cluster.disk("cli", "/root/medtune/sweeps/medmamba.py")
    script.write_text(script.read_text() + "\n# edited\n")
    arguments = f"{SMALL} --epochs 1 --trials 1 --storage {STORAGE} --name edited"
    refused = cluster.run("cli", f"cd medtune && ray submit cluster.yaml sweeps/medmamba.py -- {arguments}", check=False)
    assert "is not the same as" in refused.stdout and "ray up --no-restart cluster.yaml" in refused.stdout
    before = cluster.pids("w2", "raylet/raylet")
    cluster.run("cli", "cd medtune && ray up -y --no-restart cluster.yaml", timeout=120)
    for host in ("head", "w2"):
        copy = cluster.disk(host, "/root/medtune/sweeps/medmamba.py")
        wait_until(lambda copy=copy: copy.read_text() == script.read_text(), 30, f"{host} to be renewed")
    assert cluster.pids("w2", "raylet/raylet") == before, "nothing was restarted"


def test_the_killed_raylet_is_started_again(day, cluster):
    wait_until(lambda: alive(cluster) == 3, 90, "w1 to be back", every=1)
