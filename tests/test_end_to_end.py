"""The script as a user runs it, on generated images, small: what it prints and what it leaves behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medtune.results import load_study

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # `make sweep` itself is run by .ci/run
SMALL = "--epochs 3 --train-limit 32 --external-limit 20 --resamples 50 --batch-size 16 --image-size 28"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """`make sweep` without data and network, in little."""
    home = tmp_path_factory.mktemp("home")
    drop = ("MEDTUNE_DATA", "MEDTUNE_EXTERNAL_DIR", "WANDB_API_KEY")
    keep = {name: value for name, value in os.environ.items() if name not in drop}
    places = {"HOME": home, "XDG_CACHE_HOME": home / "cache", "MEDTUNE_STORAGE": home / "studies"}
    environment = {**keep, **{name: str(path) for name, path in places.items()}}
    command = f"{sys.executable} sweeps/medmamba.py --preset laptop --fallback --model medmamba_t --trials 5 {SMALL}"
    done = subprocess.run(command.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, home / "studies" / "medmamba-laptop-synthetic", environment


def medtune(study, *args):
    command = [sys.executable, "-m", "medtune.cli", *args]
    return subprocess.run(command, cwd=ROOT, env=study[2], capture_output=True, text=True, timeout=180)


def test_it_says_what_it_does_what_is_best_and_what_to_type_next(study):
    said, folder, _ = study
    wanted = ["GENERATED", "SYNTHETIC", "best configuration: trial", f"of this study: {folder}"]
    wanted += ["medtune best medmamba-laptop-synthetic"]
    assert [words for words in wanted if words not in said] == []
    assert "cpn" not in said.split("best configuration")[1].lower(), "figures of generated images must not read as CPN's"


def test_every_trial_that_reached_a_rung_has_external_figures_and_a_wandb_run(study):
    trials = json.loads(medtune(study, "trials", "medmamba-laptop-synthetic", "--json").stdout)
    assert len(trials) == 5 and {trial["state"] for trial in trials} == {"COMPLETE", "PRUNED"}
    assert not any(key.startswith("cpn") for trial in trials for key in trial["external"])
    for trial in trials:
        assert trial["external"]["external/auc"] is not None and trial["epochs"] >= 1
        assert "external_matched/auc" in trial["external"] and trial["node"]
    runs = list((study[1] / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 5


def test_medtune_best_answers_with_the_configuration_and_its_checkpoint(study):
    answer = json.loads(medtune(study, "best", "medmamba-laptop-synthetic", "--json").stdout)
    trial = answer["trials"][0]
    assert trial["config"]["model"] == "medmamba_t" and Path(trial["checkpoint"]).exists()
    assert answer["synthetic"] and answer["ranked_by"] == "val/loss"


def test_medtune_evaluate_gives_the_trials_own_figures_again(study):
    trial = json.loads(medtune(study, "best", "medmamba-laptop-synthetic", "--json").stdout)["trials"][0]
    found = json.loads(medtune(study, "evaluate", trial["checkpoint"], "--json").stdout)
    assert found["val/loss"] == pytest.approx(trial["best"]["val/loss"], abs=1e-5)
    assert found["test/auc"] == pytest.approx(trial["external"]["test/auc"], abs=1e-6)


@pytest.mark.slow
def test_a_study_killed_in_mid_trial_gives_the_figures_of_an_uninterrupted_one(tmp_path):
    """Real training, on CPU, one trial at a time: bit for bit."""
    command = f"{sys.executable} sweeps/medmamba.py --preset laptop --pair synthetic --model medmamba_t --trials 3 {SMALL}"
    command += " --concurrent 1 --checkpoint-seconds 0 --wandb off --name s --storage "

    def start(storage):
        return subprocess.Popen([*command.split(), str(storage)], cwd=ROOT, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=280) == 0
    killed = start(tmp_path / "killed")
    record = tmp_path / "killed" / "s" / "trials" / "0000" / "attempt-1" / "epochs.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (record.exists() and len(record.read_text().splitlines()) >= 2):
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert start(tmp_path / "killed").wait(timeout=280) == 0

    def figures(storage):
        rows = load_study("s", tmp_path / storage).rows
        return [(r.state, r.epoch, r.value, r.settings, r.latest["best"], r.latest["external"]) for r in rows]

    assert figures("killed") == figures("whole")
    assert load_study("s", tmp_path / "killed").rows[0].attempt == 2
