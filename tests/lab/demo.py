"""The lab's demonstration: a study on three hosts, one cut off the network and one killed in the middle of it.

Run (root): MEDTUNE_DATA=FOLDER python -m tests.lab.demo [SETTINGS...]

Types what README's cluster section says, with real data from $MEDTUNE_DATA (its cpn_sample/ as the external set), which the
head alone has. Prints what was typed, how long each step took, and what became of every trial.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from medtune.results import load_study
from medtune.tracking import read_epochs
from tests.lab.hosts import Lab, wait_until, why_not
from tests.lab.launcher import ray_up, submit

STORAGE = "/mnt/shared/studies"
SETTINGS = "--preset laptop --trials 6 --train-limit 256 --external-limit 100 --resamples 200"


class Steps:
    """Says what is done and how long it took."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def done(self, what: str) -> None:
        now = time.monotonic()
        print(f"{now - self.began:7.1f} s  {what}", flush=True)
        self.began = now


def trained_on(folder: Path, host: str) -> bool:
    """Whether an epoch was reported from that host."""
    lines = [line for path in folder.glob("trials/*/attempt-*") for line in read_epochs(path)]
    return any(line["report"]["node"] == host for line in lines)


def main(settings: str) -> int:
    """Returns 1 where a trial is not accounted for."""
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab:
        lab.install("cli")
        shutil.copytree(os.environ["MEDTUNE_DATA"], lab.disk("head", "/root/data"))
        steps.done("four hosts are up: cli, head, w1, w2")
        ray_up(lab)
        steps.done("ray up -y cluster.yaml: until three nodes are there")
        print(lab.run("head", f"mkdir -p {STORAGE}; medtune doctor --cluster --storage {STORAGE}", check=False).stdout)
        steps.done("medtune doctor --cluster")
        data = "--data-dir /root/data --external-dir /root/data/cpn_sample"
        client = submit(lab, f"{settings} --storage {STORAGE} --name demo {data}")
        study = lab.shared / "studies" / "demo"
        wait_until(lambda: trained_on(study, "w1") and trained_on(study, "w2"), 240, "epochs on both workers")
        steps.done("ray submit cluster.yaml sweeps/medmamba.py -- ...: until both workers have trained an epoch")
        lab.cut("w2")
        lab.kill_host("w1")
        wait_until(lambda: any(row.faults for row in load_study(str(study)).rows), 60, "the loss to be found")
        steps.done("w1 killed, w2 cut off: until the first loss is found")
        time.sleep(30)
        lab.heal("w2")
        client.wait(timeout=900)
        steps.done("w2 healed after 30 s more: until the study's end")
        print(lab.disk("cli", "/root/submit.log").read_text())
        print(lab.run("head", f"medtune trials demo --storage {STORAGE}").stdout)
        rows = load_study(str(study)).rows
        return 0 if all(row.state in ("COMPLETE", "PRUNED") for row in rows) else 1


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"no lab can be brought up here: {reason}")
    sys.exit(main(" ".join(sys.argv[1:]) or SETTINGS))
