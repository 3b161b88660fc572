"""Ways into a cluster other than `ray submit`, on real hosts: a job for who has the token, none for who has not."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.lab.hosts import Lab, address, wait_until, why_not
from tests.lab.launcher import SMALL, ray_up

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab"), hosts=("cli", "head", "w1")) as lab:
        lab.install("cli")
        ray_up(lab)
        yield lab


def test_a_job_brings_the_package_along(cluster):
    """The laptop's edits need no `ray up`, on no node."""
    edited = cluster.disk("cli", "/root/medtune/sweeps/medmamba.py")
    edited.write_text(edited.read_text().replace('main("medmamba"', 'main("edited"'))
    tunnel = cluster.popen("cli", "cd medtune && ray dashboard cluster.yaml", stdout=subprocess.DEVNULL)
    wait_until(lambda: cluster.run("cli", "exec 3<>/dev/tcp/127.0.0.1/8265", check=False).returncode == 0, 60, "the tunnel")
    words = f"{SMALL} --epochs 1 --trials 2 --storage /mnt/shared/studies"
    job = cluster.run(
        "cli",
        "cd medtune && ray job submit --address http://localhost:8265 --working-dir . -- "
        f"python sweeps/medmamba.py {words}",
        timeout=280,
    )
    tunnel.kill()
    assert "best configuration: trial" in job.stdout and "succeeded" in job.stdout
    record = json.loads((cluster.shared / "studies" / "edited-laptop" / "driver.json").read_text())
    assert (record["state"], record["status"]) == ("ended", 0)


@pytest.mark.parametrize("way", ["auto", f"ray://{address('head')}:10001"], ids=["node", "client"])
def test_who_has_not_the_token_is_not_let_in(cluster, way):
    attach = f"import ray; ray.init('{way}', logging_level='ERROR'); print('inside')"
    with_it = cluster.run("w1", f'cd /tmp && python -c "{attach}"')
    assert "inside" in with_it.stdout
    without = f'cd /tmp && HOME=/tmp RAY_AUTH_MODE=disabled timeout 90 python -c "{attach}"'
    stranger = cluster.run("w1", without, check=False)
    assert stranger.returncode != 0 and "inside" not in stranger.stdout


def test_what_people_use_listens_on_loopback_alone(cluster):
    ports = cluster.run("head", "ss -Hltn").stdout.splitlines()
    dashboard = [line for line in ports if ":8265" in line]
    assert dashboard and all("127.0.0.1:8265" in line for line in dashboard)
