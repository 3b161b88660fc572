"""`medtune choose` from a study to its choice.json: real trainings of a few weights, killed in mid-stage, then gone on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medtune import cli
from medtune.choose import command
from medtune.choose.means import Means
from medtune.choose.record import mention, read_choice
from medtune.choose.stage import finalists, fresh_seeds, open_stage, planned, settings_of, stage_config
from medtune.data import load_pair
from medtune.errors import ConfigError, StudyError
from medtune.record import write_json
from medtune.results import OPTIMISTIC, all_studies, best, epochs, load_study, trial_config
from medtune.search.space import Listed, SearchSpace
from tests.support.made_study import MadeStudy
from tests.support.tiny_trial import TinyTrial

ROOT = Path(__file__).parents[2]
SMALL = {"image_size": 28, "epochs": 3, "batch_size": 16, "train_limit": 32, "external_limit": 20, "checkpoint_seconds": 0.0}
MEANS = Means(wandb="off")


def made(folder):
    """Five trials, of which four were trained to the end; the two best are of one configuration."""
    study = MadeStudy(folder, external=load_pair("synthetic").external_name, **SMALL)
    for level, more in ((0.1, {"lr": 1e-3}), (0.2, {"lr": 1e-3}), (0.3, {"lr": 1e-2}), (0.4, {"lr": 3e-4, "momentum": 0.9})):
        study.trial(level, external={"external/auc": 1 - level}, **more)
    study.trial(0.0, state="PRUNED", epochs=1)
    record = json.loads((folder / "study.json").read_text())
    write_json(folder / "study.json", {**record, "preset": "laptop"})  # of `full` a machine without a GPU is timed first
    return study


def choose(folder, top=2, seeds=2, by=None, threshold=None):
    return command.make(str(folder), top, seeds, by, threshold, None, MEANS, TinyTrial)


def test_finalists_are_the_best_of_each_configuration_that_were_trained_to_the_end(tmp_path):
    study = made(tmp_path / "s").read()
    assert [row.number for row in finalists(study, "val/loss", 3)] == [0, 2, 3]
    assert [row.number for row in finalists(study, "external/auc", 9)] == [0, 2, 3]
    assert settings_of(study, study.rows[3])["momentum"] == 0.9
    with pytest.raises(ConfigError, match="top must be at least 1, got 0"):
        finalists(study, "val/loss", 0)
    with pytest.raises(ConfigError, match="seeds must be at least 1, got 0"):
        fresh_seeds(study, 0)
    seeds = fresh_seeds(study, 3)
    assert len(set(seeds)) == 3 and not {trial_config(study, row).seed for row in study.rows} & set(seeds)
    assert fresh_seeds(study, 5)[:3] == seeds
    none = MadeStudy(tmp_path / "none", **SMALL)
    none.trial(0.1, state="FAIL")
    with pytest.raises(StudyError, match="no trial of study 'none' was trained to the end yet"):
        finalists(none.read(), "val/loss", 3)


def test_what_the_study_s_record_does_not_hold_is_given(tmp_path):
    study = made(tmp_path / "s").read()
    means = Means(concurrent=3, checkpoint_seconds=7.0, activation_checkpointing=True)
    config = stage_config(study, [{"seed": 1}], 1, means)
    assert (config.concurrent, config.trial.checkpoint_seconds, config.trial.activation_checkpointing) == (3, 7.0, True)
    assert config.trial.image_size == SMALL["image_size"]


def test_a_plan_keeps_its_places_when_it_grows_by_seeds_and_by_settings():
    one, two = {"lr": 1e-3, "milestones": [0.3]}, {"lr": 1e-2, "milestones": [0.3, 0.6]}
    plan = planned([], [one], [7, 8])
    grown = planned(plan, [two, one], [7, 8, 9])
    assert grown[:2] == plan and len(grown) == 6
    spaces = [SearchSpace.of(each, Listed) for each in (plan, grown)]
    assert spaces[0].describe() == spaces[1].describe()
    encoded = [spaces[1].encode(each) for each in grown]
    assert len({json.dumps(each) for each in encoded}) == 6
    assert encoded[:2] == [spaces[0].encode(each) for each in plan]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A choice whose driver was killed in the middle, and its study's folder."""
    folder = tmp_path_factory.mktemp("studies") / "s"
    made(folder)
    home = folder / "stages" / "finalists"
    home.mkdir(parents=True)
    (home / "hold").write_text("3")
    code = f"from tests.choose.test_choose import choose; choose({str(folder)!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True)
    record = home / "trials" / "0000" / "attempt-1" / "epochs.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (record.exists() and len(record.read_text().splitlines()) == 2):
        assert driver.poll() is None
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    (home / "hold").unlink()
    return choose(folder), folder


@pytest.mark.slow
def test_a_killed_stage_goes_on_and_every_finalist_has_every_seed(chosen):
    found, folder = chosen
    assert len(found["finalists"]) == 2 and {one["trial"] for one in found["finalists"]} == {0, 2}
    seeds = found["seeds"]
    assert all([run["seed"] for run in one["runs"]] == seeds for one in found["finalists"])
    held = load_study("finalists", str(folder / "stages"))
    assert [row.state for row in held.rows] == ["COMPLETE"] * 4
    assert all([line["epoch"] for line in epochs(held, row)] == [1, 2, 3] for row in held.rows)
    for one in found["finalists"]:
        values = [run["value"] for run in one["runs"]]
        assert one["mean"] == pytest.approx(sum(values) / 2) and one["low"] < one["mean"] < one["high"]
        for run in one["runs"]:
            config = trial_config(held, held.rows[run["number"]])
            wanted = {**one["config"], "seed": run["seed"], "checkpoint_seconds": config.checkpoint_seconds}
            assert config.to_dict() == wanted
            assert (folder / run["folder"] / "predictions.npz").exists()
            assert list((folder / run["folder"] / "checkpoints").glob("best-*"))
    means = [one["mean"] for one in found["finalists"]]
    assert means == sorted(means), "less loss is better"
    best_run = min(range(2), key=lambda i: found["finalists"][0]["runs"][i]["value"])
    assert found["chosen"]["run"] == best_run


@pytest.mark.slow
def test_the_stage_is_no_part_of_the_study_and_the_other_commands_know_the_choice(chosen, capsys):
    found, folder = chosen
    study = load_study(str(folder))
    assert len(study.rows) == 5 and [one.name for one in all_studies(folder.parent)] == ["s"]
    assert read_choice(study) == found
    assert mention(study) in best(study)["choice"] and "fresh seeds" in mention(study)
    assert cli.main(["best", str(folder)]) == 0
    assert "chosen with evidence: trial" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_the_answer_and_json_alone_when_asked(chosen, capsys):
    found, folder = chosen
    assert cli.main(["choose", str(folder), "--top", "2", "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("chosen: trial", "set on val", "not audited", "in hindsight", "too few trials", "at the threshold"):
        assert words in said
    assert cli.main(["choose", str(folder), "--top", "2", "--seeds", "2", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {**again, "created": 0} == {**found, "created": 0}, "what is trained is not trained again"
    assert cli.main(["choose", str(folder), "--threshold", "yuden"]) == 2
    assert "threshold rule must be one of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_choice_by_external_labels_says_so_everywhere(chosen, capsys):
    _, folder = chosen
    assert cli.main(["choose", str(folder), "--top", "2", "--seeds", "2", "--by", "external/auc"]) == 0
    said = capsys.readouterr().out
    assert OPTIMISTIC in said and "EXTERNAL LABELS" in said
    study = load_study(str(folder))
    assert read_choice(study)["external_labels_used"] and "CHOSEN WITH EXTERNAL LABELS" in mention(study)
    choose(folder)
    assert "EXTERNAL" not in mention(study)


@pytest.mark.slow
def test_other_finalists_train_only_what_is_new(chosen):
    _, folder = chosen
    before = {path: path.stat().st_mtime_ns for path in (folder / "stages").glob("finalists/trials/*/attempt-*/final.json")}
    found = choose(folder, top=3, seeds=2)
    assert [len(one["runs"]) for one in found["finalists"]] == [2, 2, 2]
    assert len(open_stage(load_study(str(folder))).rows) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_other_data_are_refused_with_the_difference(tmp_path):
    folder = tmp_path / "s"
    made(folder)
    record = json.loads((folder / "study.json").read_text())
    write_json(folder / "study.json", {**record, "data": {**record["data"], "val": "another"}})
    with pytest.raises(StudyError, match=r"trained on other data:\n  data.val: 'another' -> "):
        choose(folder)
    assert not (folder / "stages").exists()
