"""Ways to start a study other than `ray submit`, on real hosts."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.lab.hosts import Lab, wait_until, why_not
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
