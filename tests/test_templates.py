"""The templates in cluster/: Ray's own schema for the launcher's, and what each must say to be safe and to work."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster"
LAUNCHER = ("onprem", "aws", "gcp")
HEALTH = ("initial_delay_ms=1000", "period_ms=1000", "timeout_ms=2000", "failure_threshold=3")


def template(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_itself_takes_the_template_filled_with_its_defaults(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(copy.deepcopy(template(name)))
    validate_config(filled)
    misspelt = {**filled, "file_mount": {}}
    with pytest.raises(Exception, match="file_mount"):
        validate_config(misspelt)


@pytest.mark.parametrize("name", LAUNCHER)
def test_all_that_make_env_needs_reaches_every_node_and_nothing_else_of_the_checkout(name):
    mounts = template(name)["file_mounts"]
    assert {local for remote, local in mounts.items() if remote.startswith("~/medtune/")} == {
        "Makefile", "LICENSE", "README.md", "pyproject.toml", "medtune", "sweeps"
    }  # fmt: skip
    assert all((ROOT / local).exists() for local in mounts.values() if not local.startswith("~"))
    assert template(name)["file_mounts_sync_continuously"] is True
    for needed in re.findall(r'(?:readme|license-files) = \[?"(\S+)"', (ROOT / "pyproject.toml").read_text()):
        assert f"~/medtune/{needed}" in mounts, "the build reads it"


@pytest.mark.parametrize("name", LAUNCHER)
def test_ports_for_people_listen_on_loopback_and_the_token_is_on(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "RAY_enable_autoscaler_v2=0" in head
    assert all(f"RAY_health_check_{setting} " in head for setting in HEALTH)
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", "a file of the user's, not a word in the YAML"
    assert not re.search(r"(?i)api_key|secret_access|password", text)


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_changes_is_marked_and_what_need_not_is_the_same_in_all(name):
    above, _, below = (FOLDER / f"{name}.yaml").read_text().partition("# Below nothing")
    assert "CHANGE" in above and "CHANGE" not in below
    same = template("onprem")
    config = template(name)
    assert config["worker_start_ray_commands"] == same["worker_start_ray_commands"]
    assert set(same["setup_commands"]) <= set(config["setup_commands"])
    assert config["file_mounts"] == same["file_mounts"]


@pytest.mark.parametrize("name", ("aws", "gcp"))
def test_clouds_have_a_head_that_trains_nothing_and_spot_workers_from_none(name):
    config = template(name)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0} and "spot" not in str(types["head"]).lower()
    assert types["gpu"]["min_workers"] == 0 and types["gpu"]["resources"]["GPU"] >= 1 and "spot" in str(types["gpu"]).lower()
    assert types["gpu"]["max_workers"] == config["max_workers"] and config["idle_timeout_minutes"] <= 10
    start = config["head_start_ray_commands"][-1]
    assert "--num-cpus=0 --num-gpus=0" in start


def test_the_rayjob_has_the_parts_that_the_operator_requires():
    """Against the fields of ray.io/v1 as KubeRay's reference lists them; no operator was at hand to ask."""
    job = template("kuberay")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= {
        "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"
    }  # fmt: skip
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"
    }  # fmt: skip
    assert cluster["authOptions"] == {"mode": "token"} and cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}, "strings, or it is refused"
    workers = cluster["workerGroupSpecs"][0]
    assert workers["minReplicas"] == 0 <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] and container["resources"]["limits"]["memory"]
        assert all(isinstance(item["value"], str) for item in container["env"])
        found = {f"{item['name']}={item['value']}" for item in container["env"]}
        assert found == {f"RAY_health_check_{setting}" for setting in HEALTH}
        names = {volume["name"] for volume in group["template"]["spec"].get("volumes", ())}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= names
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "envFrom" in head and "envFrom" not in workers["template"]["spec"]["containers"][0], "workers need no key"


STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do case $1 in --nodelist=*) export NODE=${1#*=} ;; esac; shift; done; exec "$@"',
    "scontrol": "printf 'n1\\nn2\\nn3\\n'",
    "hostname": 'echo "10.0.0.${NODE#n} fe80::1"',
    # `ray start --block` stays until it is told to go.
    "ray": 'echo "${NODE:-job} ray $*" >> "$LOG"; case "$*" in *--block*) exec sleep 300 ;; esac',
    # A study long enough for all nodes to have started.
    "python": 'until [ "$(grep -c " ray start " "$LOG")" = 3 ]; do sleep 0.05; done; '
    'echo "$RAY_ADDRESS python $*" >> "$LOG"; trap "echo stopped >> $LOG; exit 130" TERM; '
    '[ -z "${STAY:-}" ] || { sleep 300 & wait; }; exit 3',
}


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sh with stand-ins for Slurm, Ray and Python; returns the process and what they noted."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    started = []

    def run(*args, **env):
        job = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_PER_NODE": "2"}
        started.append(
            subprocess.Popen(
                ["bash", FOLDER / "slurm.sh", *args],
                cwd=tmp_path,
                env={"PATH": "/usr/bin:/bin", "LOG": str(log), **job, **env},
                start_new_session=True,
            )
        )
        return started[-1], log

    yield run
    for process in started:
        subprocess.run(["kill", "-9", "--", f"-{process.pid}"], capture_output=True)
        process.wait()


def test_slurm_starts_ray_on_each_node_and_the_study_once_and_keeps_its_exit_status(slurm):
    process, log = slurm("sweeps/medmamba.py", "--name", "a b")
    assert process.wait(timeout=60) == 3
    noted = log.read_text().splitlines()
    assert "10.0.0.1:20077 python sweeps/medmamba.py --name a b" in noted
    starts = sorted(line for line in noted if " ray start " in line)
    size = "--num-cpus 8 --num-gpus 2 --block"
    assert [line.split()[0] for line in starts] == ["n1", "n2", "n3"] and all(line.endswith(size) for line in starts)
    assert "--head --node-ip-address=10.0.0.1 --port=20077 --include-dashboard=false" in starts[0]
    assert all("--address 10.0.0.1:20077" in line for line in starts[1:])
    assert any("get-auth-token --generate" in line for line in noted)


def test_slurms_word_that_the_time_is_up_reaches_the_study(slurm):
    process, log = slurm("sweeps/medmamba.py", STAY="1")
    while "python" not in log.read_text():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=30) == 130 and "stopped" in log.read_text()


@pytest.mark.parametrize("script", [FOLDER / "slurm.sh", ROOT / "tests" / "lab" / "boot.sh"], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
