"""One attempt at a trial, without Ray: what it reports, when it tests, how it goes on and how it fails."""

import json

import numpy as np
import pytest
import torch

from medtune import metrics, predictions
from medtune import trial as trial_module
from medtune.claim import claim
from medtune.data.shifts import SHIFTS
from medtune.errors import Leaving, MachineFault, Superseded, TrainingDiverged
from medtune.lifeline import Lifeline
from medtune.search.conductor import attempt_folder, trial_folder
from medtune.steps import Stepper
from medtune.tracking import read_epochs, read_events, read_final
from medtune.trial import Attempt, AttemptSpec, MedtuneTrial, to_config

pytestmark = pytest.mark.usefixtures("small_data")


@pytest.fixture
def config(tiny_config):
    return tiny_config(train_limit=32, external_limit=16, resamples=20)


def spec(config, folder, attempt=1, **more):
    values = {
        "number": 7,
        "attempt": attempt,
        "config": config.to_dict(),
        "study": "s-1",
        "folder": str(folder),
        "rungs": (1, 2),
        "data_dir": None,
        "external_dir": None,
        "external_fallback": False,
        "wandb": "off",
        "wandb_project": "p",
        "threads": 1,
    }
    return AttemptSpec(**values | more)


def play(attempt, epochs):
    return [attempt.next_report() for _ in range(epochs)]


def figures(report):
    """What must not depend on interruptions: all but the clock and the attempt."""
    return {k: v for k, v in report.to_dict().items() if k not in ("seconds", "attempt", "node")}


def test_an_uninterrupted_and_an_interrupted_trial_report_the_same(config, tmp_path):
    straight = play(Attempt(spec(config, tmp_path / "a")), 4)
    first = Attempt(spec(config, tmp_path / "b"))
    begun = play(first, 2)
    first.close()
    second = Attempt(spec(config, tmp_path / "b", attempt=2))
    going_on = play(second, 2)
    assert [figures(r) for r in begun] == [figures(r) for r in straight[:2]]
    last, wanted = figures(going_on[-1]), figures(straight[-1])
    # A test of unchanged best weights is not repeated; the figures are those of the same weights either way.
    assert last == wanted
    assert straight[-1].status == "complete" and [r.epoch for r in going_on] == [3, 4]


def test_an_epoch_that_was_saved_but_not_recorded_is_told_by_the_next_attempt(config, tmp_path):
    straight = play(Attempt(spec(config, tmp_path / "a")), 4)

    def dies(_):
        raise MachineFault("the process is killed here")

    for trained in (1, 3):
        folder = tmp_path / f"after-{trained}"
        first = Attempt(spec(config, folder))
        play(first, trained)
        first.record.epoch = dies
        with pytest.raises(MachineFault):
            first.next_report()
        first.close()
        going_on = play(Attempt(spec(config, folder, attempt=2)), 4 - trained)
        assert [figures(r) for r in going_on] == [figures(r) for r in straight[trained:]]
        told = [line["epoch"] for n in (1, 2) for line in read_epochs(attempt_folder(folder / "trials", 7, n))]
        assert told == [1, 2, 3, 4]


def test_external_figures_at_rungs_and_at_the_end_own_test_at_the_end(config, tmp_path):
    reports = play(Attempt(spec(config, tmp_path)), 4)
    assert all(r.external for r in reports[:2]) and "external/auc" in reports[0].external
    assert "external_matched/auc" in reports[0].external
    assert not any(key.startswith("test/") for key in reports[2].external)
    end = reports[3].external
    assert {"external/auc/low", "external/auc/high", "test/auc", "test/loss"} <= set(end)
    assert not any(key.startswith("cpn") for key in end), "synthetic images are not CPN"
    logits = predictions.read(attempt_folder(tmp_path / "trials", 7, 1))
    assert set(logits) == {"val", "val_shift", "test", "external", "external_matched"}
    shifted = logits.pop("val_shift")
    assert len(shifted.labels) == len(SHIFTS) * len(logits["val"].labels)
    aucs = [
        metrics.classification(metrics.softmax(part), logits["val"].labels)["auc"]
        for part in np.split(shifted.logits, len(SHIFTS))
    ]
    assert end["val_shift/auc"] == pytest.approx(np.mean(aucs)) and len(set(aucs)) > 1
    for split, found in logits.items():
        figure = metrics.classification(metrics.softmax(found.logits), found.labels)["auc"]
        assert figure == (reports[3].best if split == "val" else end)[f"{split}/auc"]


def test_at_most_one_external_test_for_the_same_weights(config, tmp_path, monkeypatch):
    tested = []
    real = trial_module.external_test
    monkeypatch.setattr(trial_module, "external_test", lambda *a: tested.append(1) or real(*a))
    reports = play(Attempt(spec(config, tmp_path)), 4)
    bests = {r.best["epoch"] for r in (reports[0], reports[1], reports[3])}
    assert len(tested) == len(bests) <= 3


def test_the_record_is_written_before_the_report_and_readable_while_running(config, tmp_path):
    attempt = Attempt(spec(config, tmp_path))
    folder = attempt_folder(tmp_path / "trials", 7, 1)
    report = attempt.next_report()
    lines = read_epochs(folder)
    assert [line["epoch"] for line in lines] == [1] and lines[0]["report"] == json.loads(json.dumps(report.to_dict()))
    assert read_final(folder) is None
    play(attempt, 3)
    assert read_final(folder)["status"] == "complete"


def test_what_goes_wrong_in_a_trial_is_its_failure_with_a_cause(config, tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise TrainingDiverged("train loss is nan at epoch 1")

    monkeypatch.setattr(trial_module, "fit", diverge)
    report = Attempt(spec(config, tmp_path)).next_report()
    assert (report.status, report.cause) == ("fail", "TrainingDiverged: train loss is nan at epoch 1")
    assert report.repeats
    assert read_final(attempt_folder(tmp_path / "trials", 7, 1))["status"] == "fail"


def test_data_that_are_gone_fail_the_trial_with_the_way_out(config, tmp_path):
    real = config.replace(pair="pneumoniamnist-cpn")
    report = Attempt(spec(real, tmp_path, data_dir=str(tmp_path / "none"))).next_report()
    assert report.status == "fail" and "medtune data get" in report.cause and not report.repeats


def test_wandb_that_breaks_changes_nothing(config, tmp_path, monkeypatch):
    plain = play(Attempt(spec(config, tmp_path / "a")), 4)

    def broken(self, *_, **__):
        raise RuntimeError("wandb is broken")

    monkeypatch.setattr("medtune.wandb_run.WandbRun._start", broken)
    with_wandb = play(Attempt(spec(config, tmp_path / "b", wandb="auto")), 4)
    assert [figures(r) for r in with_wandb] == [figures(r) for r in plain]


def test_steps_that_could_not_be_recorded_are_told_once_and_end_the_process_use(config, tmp_path, monkeypatch):
    class Unrecorded(Stepper):
        problem = "RuntimeError: aten::item asks the device"

    def stepper(net, optimizer, config, weights, group, images):
        return Unrecorded(net, optimizer, config, weights, group)

    monkeypatch.setattr("medtune.training.stepper_of", stepper)
    (tmp_path / "study.json").write_text("{}")  # the folder is a study's
    actor = MedtuneTrial(to_config(spec(config, tmp_path)))
    for _ in range(4):
        actor.step()
    told = [e["message"] for e in read_events(attempt_folder(tmp_path / "trials", 7, 1)) if e["kind"] == "warning"]
    assert told == ["steps run kernel by kernel, as they could not be recorded: RuntimeError: aten::item asks the device"]
    monkeypatch.setattr("medtune.steps._broken", Unrecorded.problem)
    with pytest.raises(MachineFault, match="steps broke off in this process: RuntimeError: aten::item asks the device"):
        actor.reset_config(to_config(spec(config, tmp_path, number=8)))


@pytest.fixture
def watched(config, tmp_path, monkeypatch):
    """A trial's actor on a cluster, and its lifeline."""
    line = Lifeline("127.0.0.1:1", lambda: False, every=1, patience=1)  # never begun
    monkeypatch.setattr(trial_module, "to_this_cluster", lambda: line)
    slow = config.replace(checkpoint_seconds=1000.0)
    (tmp_path / "study.json").write_text("{}")  # the folder is a study's
    return MedtuneTrial(to_config(spec(slow, tmp_path, watched=True, rungs=()))), line


def test_an_attempt_that_goes_on_elsewhere_ends(watched, tmp_path):
    actor, line = watched
    claim(trial_folder(tmp_path / "trials", 7), 1)
    actor.step()
    claim(trial_folder(tmp_path / "trials", 7), 2)
    with pytest.raises(Superseded, match="attempt 1 goes on elsewhere as attempt 2"):
        actor.step()
    folder = attempt_folder(tmp_path / "trials", 7, 1)
    assert len(read_epochs(folder)) == 1 and not list(folder.glob("checkpoints/*"))
    line.note("the head is gone")
    assert read_events(folder)[-1]["message"] == "the head is gone"


def test_on_a_machine_about_to_leave_every_epoch_is_saved_and_no_trial_begun(watched, tmp_path, config):
    actor, line = watched
    line.leaving = True
    actor.step()
    assert (attempt_folder(tmp_path / "trials", 7, 1) / "checkpoints" / "last-0001.safetensors").exists()
    with pytest.raises(Leaving):
        actor.reset_config(to_config(spec(config, tmp_path, number=8, watched=True)))


@pytest.mark.parametrize(
    ("held", "returned"), [({"workspaces": 300}, True), ({"workspaces": 300, "model": 200}, False), ({}, True)]
)
def test_what_libraries_keep_for_streams_is_not_a_trials(monkeypatch, held, returned) -> None:
    """MiB on a GPU that is not here."""
    held = dict(held)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: sum(held.values()) << 20)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: held.pop("workspaces", None), raising=False)
    assert trial_module.memory_returned() == returned
