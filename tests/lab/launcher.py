"""The template for machines reached by SSH, filled in for a lab, and what a user types with it."""

from __future__ import annotations

import re
import subprocess
import time

from tests.lab.hosts import ROOT, Lab, address, wait_until

SMALL = "--preset laptop --pair synthetic --model medmamba_t --train-limit 32 --external-limit 20 --resamples 50"
SMALL += " --batch-size 16 --image-size 28 --checkpoint-seconds 0"


def filled_template(lab: Lab, cpus: int = 1) -> str:
    """cluster/onprem.yaml with what it says to CHANGE changed, and nodes of so many CPUs: they share one machine."""
    text = (ROOT / "cluster" / "onprem.yaml").read_text()
    workers = ", ".join(address(host) for host in lab.hosts if host.startswith("w"))
    marked = {"head_ip": address("head"), "worker_ips": f"[{workers}]", "ssh_user": "root"}
    for name, value in marked.items():
        text, found = re.subn(rf"(?m)^(\s+{name}:) .*# CHANGE.*$", rf"\1 {value}", text)
        assert found == 1, f"{name} is not marked once in the template"
    return text.replace("ray start", f"ray start --num-cpus={cpus} --object-store-memory=150000000")


def alive(lab: Lab) -> int:
    """How many nodes the head counts."""
    told = "import ray; ray.init('auto', logging_level='ERROR'); print('alive:', sum(n['Alive'] for n in ray.nodes()))"
    found = re.search(r"alive: (\d+)", lab.run("head", f'cd /tmp && python -c "{told}"', check=False).stdout)
    return int(found[1]) if found else 0


def ray_up(lab: Lab, cpus: int = 1) -> float:
    """`ray up cluster.yaml` as a user types it; returns the seconds until all nodes were there."""
    began = time.monotonic()
    (lab.disk("cli", "/root/medtune/cluster.yaml")).write_text(filled_template(lab, cpus))
    lab.run("cli", "ray get-auth-token --generate > /dev/null")
    lab.run("cli", "cd medtune && ray up -y cluster.yaml", timeout=200)
    expected = len([host for host in lab.hosts if host != "cli"])
    wait_until(lambda: alive(lab) == expected, 120, f"{expected} nodes", every=0.5)
    return time.monotonic() - began


def submit(lab: Lab, arguments: str, script: str = "sweeps/medmamba.py") -> subprocess.Popen[str]:
    """`ray submit cluster.yaml SCRIPT -- ARGUMENTS`, in a terminal as a user's; output goes to ~/submit.log."""
    command = f"ray submit cluster.yaml {script} -- {arguments}"
    return lab.popen("cli", f"cd medtune && exec script -qefc '{command}' ~/submit.log > /dev/null")
