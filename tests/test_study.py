"""A study through Ray, with played trials: what is kept, refused, continued, stopped."""

import hashlib
import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import ray
import torch

from benchmarks import kill_resume
from benchmarks.played import PlayedTrial, SpentTrial, definition
from medtune import cli, models
from medtune.config import TrialConfig
from medtune.data.pairs.synthetic import generate
from medtune.definition import Definition, describe
from medtune.errors import CheckpointError, ConfigError, LaunchBroke, StudyError
from medtune.results import best, fixed_settings, load_study, print_outcome, rank, study_summary, trial_config, trial_summary
from medtune.search.plan import plan
from medtune.search.space import Choice, Real, SearchSpace
from medtune.study import run_study, study_name
from medtune.watch import Watch
from tests.support.failing_trial import FailingTrial

END_RAY = ray.shutdown


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    """Studies of this process go on with the Ray that the first of them started, which takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "shutdown", lambda: None)
        yield
    ray.shutdown()


@pytest.fixture
def own_ray(monkeypatch):
    """A study ends Ray, as users' do: one that breaks leaves processes behind that nobody else ends."""
    END_RAY()
    monkeypatch.setattr(ray, "shutdown", END_RAY)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def played(storage):
    """Twelve played trials, of which the best two keep their checkpoints."""
    config = replace(kill_resume.config(storage, 12), keep=2)
    return config, run_study(config, definition("kill"), PlayedTrial)


def checkpoints(folder):
    return {path.parents[2].name for path in folder.glob("trials/*/attempt-*/checkpoints/*.safetensors")}


def test_as_many_trials_as_asked_each_accounted_for(played):
    config, folder = played
    kill_resume.check(load_study("kill", config.storage), 12)
    states = {row.state for row in load_study(str(folder)).rows}
    assert states == {"COMPLETE", "PRUNED"}


def test_only_the_best_keep_their_checkpoints(played):
    config, folder = played
    ranked = rank(load_study(str(folder)), "val/loss")
    assert checkpoints(folder) == {f"{row.number:04d}" for row in ranked[: config.keep]}
    assert not list(folder.glob("trials/*/attempt-*/checkpoints/last-*"))


def test_the_same_command_adds_nothing_and_more_trials_extend(played, capsys):
    config, folder = played
    before = [row.attrs for row in load_study(str(folder)).rows]
    assert run_study(config, definition("kill"), PlayedTrial) == folder
    assert [row.attrs for row in load_study(str(folder)).rows] == before
    run_study(replace(config, trials=14, concurrent=1), definition("kill"), PlayedTrial)
    rows = load_study(str(folder)).rows
    assert len(rows) == 14 and [row.attrs for row in rows[:12]] == before


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"first_rung": 0.4}, r"first_rung: 0.2 -> 0.4"),
        ({"trial": {"batch_size": 16}}, r"batch_size: 64 -> 16"),
    ],
)
def test_other_settings_under_the_same_name_are_refused(played, change, shown):
    config, _ = played
    trial = config.trial.replace(**change.pop("trial", {}))
    with pytest.raises(StudyError, match=shown):
        run_study(replace(config, trial=trial, **change), definition("kill"), PlayedTrial)


def test_another_space_is_refused(played):
    config, _ = played
    narrow = Definition(script="kill", space=SearchSpace(lr=Real(low=1e-3, high=1e-2, log=True)))
    with pytest.raises(StudyError, match=r"space.gamma: .* -> None"):
        run_study(config, narrow, PlayedTrial)


PLANNED = (
    {"model": "medmamba_t", "epochs": 2, "milestones": (0.5,)},
    {"model": "resnet50", "epochs": 3, "milestones": (1 / 3, 1 / 2), "clip_norm": 1.0},
)


def planned(storage, seeds=1, settings=PLANNED, **changes):
    base = kill_resume.config(storage, 1)
    first = plan(settings, base.trial, seeds=seeds)
    config = replace(base, **{"name": "plan", "first_rung": 1.0, "trials": len(first)} | changes)
    return config, Definition(script="plan", space=SearchSpace.of(first), first=first, planned=True)


@pytest.fixture(scope="module")
def plan_run(storage):
    return run_study(*planned(storage, concurrent=1), PlayedTrial)


def test_a_plan_is_trained_to_its_end_as_it_stands(plan_run, storage, capsys):
    study = load_study("plan", storage)
    assert [(row.state, row.epoch) for row in study.rows] == [("COMPLETE", 2), ("COMPLETE", 3)]
    configs = [trial_config(study, row) for row in study.rows]
    shared = planned(storage)[0].trial
    assert configs == [shared.replace(**settings, seed=0) for settings in PLANNED], "both from the same seed"
    assert [(item["epochs"], item["epochs_asked"]) for item in (trial_summary(study, row) for row in study.rows)] == [
        (2, 2), (3, 3)
    ]
    assert cli.main(["trials", "plan", "--storage", str(storage)]) == 0
    assert "3/3" in capsys.readouterr().out
    assert print_outcome(plan_run)
    assert f"compare plan --storage {storage}" in capsys.readouterr().out


def test_a_plan_may_grow_by_seeds_and_nothing_else(plan_run, storage):
    run_study(*planned(storage, seeds=2, trials=2), PlayedTrial)  # nothing to train: the first two are done
    assert [one["seed"] for one in load_study("plan", storage).record["first"]] == [0, 0, 1, 1]
    run_study(*planned(storage, seeds=1), PlayedTrial)
    assert len(load_study("plan", storage).record["first"]) == 4, "the longer plan is kept"
    with pytest.raises(StudyError, match=r"settings 1: .*'medmamba_t'.* -> .*'resnet50'"):
        run_study(*planned(storage, settings=PLANNED[::-1]), PlayedTrial)
    with pytest.raises(StudyError, match="a plan and a search are not the same study"):
        run_study(planned(storage)[0], definition("plan"), PlayedTrial)


def test_what_a_plan_cannot_do_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="trials must be at most the 2 that are planned, got 3"):
        run_study(*planned(tmp_path, trials=3), PlayedTrial)
    with pytest.raises(ConfigError, match="first_rung must be 1 in a planned study"):
        run_study(*planned(tmp_path, first_rung=0.2), PlayedTrial)
    with pytest.raises(ConfigError, match=r"milestones must be rising"):
        run_study(*planned(tmp_path, settings=({"milestones": (0.5, 0.2)},)), PlayedTrial)
    assert not (tmp_path / "plan").exists()


def test_new_takes_the_next_free_name(played):
    config, _ = played
    assert study_name(config, "kill") == "kill"
    assert study_name(replace(config, new=True), "kill") == "kill-2"
    assert study_name(replace(config, name=None, new=True), "other") == "other-laptop"


def test_best_ranks_by_val_among_those_trained_to_the_end(played):
    _, folder = played
    study = load_study(str(folder))
    answer = best(study, top=3)
    complete = [row for row in study.rows if row.state == "COMPLETE"]
    values = sorted(row.value for row in complete)
    assert [trial["value"] for trial in answer["trials"]] == values[:3] and answer["of"] == len(complete)
    assert answer["ranked_by"] == "val/loss" and answer["caution"] is None
    assert answer["trials"][0]["config"]["lr"] == answer["trials"][0]["params"]["lr"]


def test_an_unknown_metric_names_those_there_are(played):
    with pytest.raises(ConfigError, match=r"unknown metric 'val/los'. Did you mean 'val/loss'"):
        best(load_study(str(played[1])), by="val/los")


def test_commands_answer_in_json(played, capsys):
    config, _ = played
    assert cli.main(["trials", "kill", "--storage", str(config.storage), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["number"] for item in found] == list(range(len(found)))
    assert cli.main(["studies", "--storage", str(config.storage), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "kill"
    assert cli.main(["best", "kil", "--storage", str(config.storage)]) == 2
    assert "Did you mean 'kill'" in capsys.readouterr().err


def test_a_damaged_ledger_is_named_and_hides_no_other_study(played, tmp_path, capsys):
    _, folder = played
    for name in ("broken", "whole"):
        shutil.copytree(folder, tmp_path / name)
    journal = tmp_path / "broken" / "ledger.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:5], "{damaged\n", *lines[5:]]))
    with pytest.raises(StudyError, match=r"ledger .*broken.* is damaged"):
        load_study("broken", tmp_path)
    assert cli.main(["studies", "--storage", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 1 and "broken" in said.err


def test_a_process_that_is_not_fit_for_another_trial_is_replaced(tmp_path):
    folder = run_study(replace(kill_resume.config(tmp_path, 3), concurrent=1), definition("kill"), SpentTrial)
    rows = load_study(str(folder)).rows
    assert [row.state for row in rows if row.state not in ("COMPLETE", "PRUNED")] == []
    assert any(row.faults for row in rows) and max(row.faults for row in rows) == 1


def test_a_study_whose_first_trials_all_fail_alike_stops_and_can_go_on(tmp_path):
    config = replace(kill_resume.config(tmp_path, 12), alike_failures=3, retries=1, concurrent=1)
    for launch in (1, 2):
        with pytest.raises(StudyError, match=r"first 3 trials that ended all failed alike.*bytes are missing.*same command"):
            run_study(config, definition("kill"), FailingTrial)
        rows = load_study("kill", tmp_path).rows
        assert [row.state for row in rows] == ["FAIL"] * 3 * launch and {row.attempt for row in rows} == {2}
        assert {tuple(row.errors) for row in rows} == {("1",)}


def test_resume_goes_on_with_a_study_there_is_and_names_the_nearest_else(played, tmp_path):
    config, folder = played
    assert run_study(replace(config, resume=True), definition("kill"), PlayedTrial) == folder
    with pytest.raises(StudyError, match=r"unknown study 'kil'. Did you mean 'kill'.*--name"):
        run_study(replace(config, name="kil", resume=True), definition("kill"), PlayedTrial)
    with pytest.raises(StudyError, match="nothing to resume"):
        run_study(replace(config, storage=tmp_path, resume=True), definition("kill"), PlayedTrial)
    with pytest.raises(ConfigError, match="resume must be left out with new"):
        replace(config, resume=True, new=True)


def test_a_request_that_no_machine_can_meet_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"cpus_per_trial is 4096, but no machine here has more than \d+ CPUs"):
        run_study(replace(kill_resume.config(tmp_path, 3), cpus_per_trial=4096), definition("kill"), PlayedTrial)


def test_a_space_with_an_impossible_value_is_refused_before_anything_starts(tmp_path):
    bad = Definition(script="kill", space=SearchSpace(lr=Real(low=1e-3, high=5.0, log=True)))
    with pytest.raises(ConfigError, match=r"lr must be in \(0, 1\], got 5.0"):
        run_study(kill_resume.config(tmp_path, 3), bad, PlayedTrial)
    assert not (tmp_path / "kill").exists()


def test_weights_to_start_from_are_checked_before_anything_starts_and_are_part_of_the_study(tmp_path):
    config = kill_resume.config(tmp_path, 3)

    def start(**settings):
        return replace(config, trial=config.trial.replace(model="resnet50", **settings))

    with pytest.raises(CheckpointError, match=r"nosuch\.pth does not exist"):
        run_study(start(pretrained="nosuch.pth"), definition("kill"), PlayedTrial)
    torch.save(models.build("resnet50").state_dict(), tmp_path / "start.pth")
    both = Definition(script="kill", space=SearchSpace(model=Choice(options=("resnet50", "medmamba_t"))))
    with pytest.raises(CheckpointError, match=r"start\.pth as medmamba_t: the checkpoint does not fit"):
        run_study(start(pretrained=str(tmp_path / "start.pth")), both, PlayedTrial)
    assert not (tmp_path / "kill").exists()
    given = describe(start(pretrained=str(tmp_path / "start.pth")), definition("kill"), generate())["data"]
    digest = hashlib.sha256((tmp_path / "start.pth").read_bytes()).hexdigest()
    assert given["pretrained start.pth"] == digest


def test_the_answer_names_what_was_fixed_and_is_not_a_default():
    config = TrialConfig(imbalance="weighted", lr=0.01, gamma=0.5, batch_size=8).to_dict()
    assert fixed_settings(config, {"lr": 0.01}) == {"gamma": 0.5, "imbalance": "weighted"}


def test_a_storage_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"cannot write to the study.s folder .*--storage"):
        run_study(kill_resume.config(tmp_path / "file", 3), definition("kill"), PlayedTrial)


def test_what_a_killed_driver_left_untidy_is_tidied(played, tmp_path):
    config, folder = played
    copy = tmp_path / "kill"
    shutil.copytree(folder, copy)
    loser = next(row for row in load_study(str(copy)).rows if row.state == "PRUNED")
    home = copy / "trials" / f"{loser.number:04d}"
    (home / "outcome.json").unlink()
    left = home / f"attempt-{loser.attempt}" / "checkpoints" / "last-0001.safetensors"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"x")
    run_study(replace(config, storage=tmp_path, trials=len(load_study(str(copy)).rows)), definition("kill"), PlayedTrial)
    assert not left.exists() and json.loads((home / "outcome.json").read_text()) == {"state": "PRUNED"}


def test_one_trial_at_a_time_two_studies_of_one_seed_are_equal(tmp_path):
    rows = []
    for name in ("a", "b"):
        config = replace(kill_resume.config(tmp_path, 8), name=name, concurrent=1)
        run_study(config, definition("kill"), PlayedTrial)
        study = load_study(name, tmp_path)
        rows.append([(row.state, row.epoch, row.value, row.settings) for row in study.rows])
    assert rows[0] == rows[1]


def test_a_run_of_tunes_that_breaks_is_begun_anew_from_the_ledger(own_ray, storage, monkeypatch, capsys):
    """Once in mid-study and once when all is done; that the first launch got nowhere would have been the end."""
    tick, end, broken = Watch.tick, Watch.end, []

    def breaks(self):
        tick(self)
        if not broken and any(row.finished for row in self.conductor.rows.values()):
            broken.append("tick")
            raise RuntimeError("started a trial that was lost")

    def breaks_again(self):
        end(self)
        if "tick" in broken and "end" not in broken:
            broken.append("end")
            raise KeyError("an actor")

    monkeypatch.setattr(Watch, "tick", breaks)
    monkeypatch.setattr(Watch, "end", breaks_again)
    config = replace(kill_resume.config(storage, 4), name="broken", concurrent=1)
    folder = run_study(config, definition("broken"), PlayedTrial)
    assert broken == ["tick", "end"] or broken == ["tick"]
    kill_resume.check(load_study("broken", config.storage), 4)
    assert "Ray Tune ended with" in capsys.readouterr().out
    assert {row.faults for row in load_study(str(folder)).rows} == {0}, "no trial is charged with it"


def test_a_run_of_tunes_that_gets_nowhere_is_told(own_ray, storage, monkeypatch):
    def breaks(self):
        raise RuntimeError("nothing goes")

    monkeypatch.setattr(Watch, "tick", breaks)
    with pytest.raises(LaunchBroke, match="nothing goes"):
        run_study(replace(kill_resume.config(storage, 2), name="nowhere"), definition("nowhere"), PlayedTrial)


def test_a_study_that_is_running_is_not_run_twice_and_ctrl_c_ends_it_cleanly(tmp_path, monkeypatch):
    monkeypatch.setattr("medtune.storage.home.OTHER_DRIVER", 0.5)
    process = subprocess.Popen(
        [*kill_resume.command(tmp_path, 50)], env=kill_resume.environment(0.3), stdout=subprocess.PIPE, text=True
    )
    journal = tmp_path / "kill" / "ledger.journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and '"rung:1"' in journal.read_text()):
        time.sleep(0.1)
    with pytest.raises(StudyError, match="another process"):
        run_study(kill_resume.config(tmp_path, 50), definition("kill"), PlayedTrial)
    running = load_study("kill", tmp_path)
    assert running.running and study_summary(running)["trials"].get("RUNNING")
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert time.monotonic() - started < 20
    assert "go on from their last checkpoint" in output
    left = load_study("kill", tmp_path)
    assert not left.running and "WAITING" in study_summary(left)["trials"]
    assert not any(row.state == "FAIL" for row in left.rows)


@pytest.mark.parametrize(("kills", "trials"), [(2, 30), pytest.param(5, 80, marks=pytest.mark.slow)])
def test_killed_again_and_again_and_every_trial_accounted_for(tmp_path, kills, trials):
    account = kill_resume.campaign(tmp_path, kills=kills, trials=trials, seed=1)
    assert account.kills == kills, "the study ended before it could be killed"
