"""The lab itself: what a host sees of the others, of the machine and of the world."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.lab.hosts import Lab, address, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab"), hosts=("cli", "head", "w1")) as lab:
        lab.install("cli")
        yield lab


def ssh(lab, host, command):
    options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o ConnectTimeout=2 -o LogLevel=ERROR"
    return lab.run("cli", f"ssh {options} {address(host)} {command!r}", check=False, timeout=20)


def test_hosts_reach_each_other_by_ssh_and_share_one_folder_alone(lab):
    lab.run("head", "echo from-head > /mnt/shared/word && echo private > /tmp/mine")
    assert ssh(lab, "w1", "hostname; cat /mnt/shared/word; cat /tmp/mine").stdout == "w1\nfrom-head\n"
    assert (lab.shared / "word").read_text() == "from-head\n" and lab.disk("head", "/tmp/mine").exists()


def test_a_host_can_neither_write_to_the_machine_nor_leave_the_lab(lab):
    assert "Read-only" in lab.run("head", "touch /etc/written-by-a-lab", check=False).stderr
    assert lab.run("head", "exec 3<>/dev/tcp/192.0.2.1/80", check=False).returncode != 0
    assert "default" not in lab.run("head", "ip route").stdout


def test_the_environment_is_there_and_make_env_has_nothing_to_do(lab):
    said = lab.run("cli", "cd medtune && make env && which python ray medtune && medtune models | head -3").stdout
    assert "/root/medtune/.venv/bin/python" in said and "medmamba" in said and "installing" not in said
    where = lab.run("cli", "python -c 'import medtune, ray; print(medtune.__file__)'").stdout.strip()
    assert where == "/root/medtune/medtune/__init__.py"


def test_a_cut_host_is_heard_of_again_when_it_is_healed(lab):
    lab.cut("w1")
    assert ssh(lab, "w1", "true").returncode == 255
    lab.heal("w1")
    assert ssh(lab, "w1", "true").returncode == 0


def test_a_killed_host_takes_its_processes_along_and_boots_with_its_disk(lab):
    lab.run("w1", "echo kept > kept")
    sleeper = lab.popen("w1", "sleep 1000", stdout=subprocess.DEVNULL)
    while not lab.pids("w1", "sleep 1000"):
        time.sleep(0.05)
    lab.kill_host("w1")
    assert sleeper.wait(timeout=5) != 0
    lab.start_host("w1")
    assert ssh(lab, "w1", "cat kept").stdout == "kept\n" and lab.pids("w1", "sleep 1000") == []


def test_two_labs_run_side_by_side(lab, tmp_path):
    with Lab(tmp_path, hosts=("cli", "head")) as other:
        other.run("head", "echo other > /tmp/where")
        assert ssh(other, "head", "cat /tmp/where").stdout == "other\n"
        assert "other" not in ssh(lab, "head", "cat /tmp/where").stdout
