"""`medtune doctor` and the start of a study among real hosts: what is wrong with one is named before any trial."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator

import pytest
import yaml

from tests.lab.hosts import Lab, address, wait_until, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
START = "--num-cpus=1 --object-store-memory=100000000 --disable-usage-stats"
STORAGE = "/mnt/shared/studies"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A cluster of head and w1. The launcher was told of w2, which does not know its key, and of w3, which is off."""
    with Lab(tmp_path_factory.mktemp("lab"), hosts=("head", "w1", "w2")) as lab:
        lab.install("head", "w1", "w2")
        token = secrets.token_hex(32)
        for host in lab.hosts:
            folder = lab.disk(host, "root/.ray")
            folder.mkdir(exist_ok=True)
            (folder / "auth_token").write_text(token)
            (folder / "auth_token").chmod(0o600)
        (lab.shared / "studies").mkdir()
        workers = [address(host) for host in ("w1", "w2", "w3")]
        told = {
            "provider": {"type": "local", "head_ip": address("head"), "worker_ips": workers},
            "auth": {"ssh_user": "root", "ssh_private_key": "~/ray_bootstrap_key.pem"},
        }
        lab.disk("head", "root/ray_bootstrap_config.yaml").write_text(yaml.safe_dump(told))
        lab.run("head", "install -m 600 /mnt/etc/key ray_bootstrap_key.pem")
        # What the launcher's shells find; the lab's own commands have it already.
        lab.run("w2", "echo 'export PATH=/root/medtune/.venv/bin:$PATH' >> .bashrc; mv .ssh/authorized_keys .ssh/off")
        lab.run("head", f"ray start --head --port=6379 --include-dashboard=false {START}")
        join(lab, "w1")
        yield lab


def join(lab: Lab, host: str) -> None:
    lab.run(host, f"ray start --address={address('head')}:6379 {START}")


def doctor(lab: Lab, storage: str = STORAGE) -> tuple[int, str]:
    """Its exit status, and its findings, one line each."""
    done = lab.run("head", f"medtune doctor --cluster --json --storage {storage}", check=False)
    findings = json.loads(done.stdout)["findings"]
    return done.returncode, "\n".join(f"{f['severity']} {f['node']}: {f['what']}. {f['remedy']}" for f in findings)


def test_hosts_that_did_not_join_are_named_with_the_reason(lab: Lab):
    status, told = doctor(lab)
    assert status == 1
    assert f"error {address('w2')}: is not in the cluster: ssh as root fails" in told and "Permission denied" in told
    assert f"error {address('w3')}: is not in the cluster: nothing answers on its SSH port" in told
    assert told.count("error") == 2


def test_a_host_whose_ray_does_not_run_or_is_another(lab: Lab):
    lab.run("w2", "mv .ssh/off .ssh/authorized_keys")
    try:
        assert f"error {address('w2')}: is not in the cluster: Ray does not run there" in doctor(lab)[1]
        lab.run("w2", "mkdir -p old/ray-2.9.0.dist-info && printf 'Metadata-Version: 2.1\\nName: ray\\nVersion: 2.9.0\\n' > "
                "old/ray-2.9.0.dist-info/METADATA && echo 'export PYTHONPATH=/root/old' >> .bashrc")  # fmt: skip
        told = doctor(lab)[1]
        assert f"error {address('w2')}: is not in the cluster: it has Ray 2.9.0, the head has" in told
    finally:
        lab.run("w2", "mv .ssh/authorized_keys .ssh/off; rm -rf old; sed -i '$d' .bashrc")


def test_a_study_does_not_begin_with_stale_code_or_a_storage_that_is_not_shared(lab: Lab):
    lab.run("w1", "echo '# last week' >> medtune/medtune/trial.py")
    study = "python medtune/sweeps/medmamba.py --preset laptop --pair synthetic --trials 2 --storage /root/studies"
    try:
        done = lab.run("head", study, check=False)
    finally:
        lab.install("w1")
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "nothing was started" in said
    assert f"error: w1 ({address('w1')}): medtune in /root/medtune/medtune is not the driver's: trial.py differs" in said
    assert "ray up --no-restart cluster.yaml" in said
    assert f"error: w1 ({address('w1')}): the storage folder /root/studies is not the driver's: no such folder" in said
    # w2's absence is no reason to refuse, and is said all the same.
    assert f"warning: {address('w2')}: is not in the cluster" in said
    assert not list(lab.disk("head", "root/studies").glob("*/trials/*"))


def test_a_storage_of_the_same_name_on_each_host_is_none(lab: Lab):
    lab.run("w1", "mkdir -p studies")
    assert "the storage folder /root/studies is not the driver's: what the driver wrote is not there" in doctor(
        lab, "/root/studies"
    )[1]


ROSTER = f"""
import time
from medtune.cluster import roster
from medtune.cluster.preflight import preflight
from medtune.launch import start_ray
roster.AGAIN = 2.0
start_ray()
nodes = preflight("{STORAGE}", lambda line: print(line, flush=True))
count = 0
while count < 3:
    if count != len(nodes.fit_nodes()):
        count = len(nodes.fit_nodes())
        print("FIT", count, flush=True)
    time.sleep(0.1)
"""


def test_a_host_that_joins_late_with_stale_code_takes_no_trials_until_it_is_renewed(lab: Lab):
    lab.run("w2", "echo '# last week' >> medtune/medtune/trial.py")
    lab.disk("head", "root/roster.py").write_text(ROSTER)
    with open(lab.folder / "roster.log", "w") as log:
        process = lab.popen("head", "python roster.py", stdout=log, stderr=subprocess.STDOUT)

    def said() -> str:
        return (lab.folder / "roster.log").read_text()

    wait_until(lambda: "FIT 2" in said(), 60, "the roster to begin")
    join(lab, "w2")
    wait_until(lambda: "trial.py differs" in said(), 60, "the joiner to be named")
    assert f"w2 ({address('w2')}) has joined and takes no trials until this is mended" in said()
    assert "FIT 3" not in said()
    lab.install("w2")
    assert process.wait(60) == 0
    assert said().count("trial.py differs") == 1 and said().rstrip().endswith("FIT 3")
