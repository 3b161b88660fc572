"""The study's W&B sweep: registered once, runs attached, and nothing lost with a server that knows no sweeps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medtune.record import write_json
from medtune.search.space import Choice, Dimension, Following, Listed, Milestones, Real, SearchSpace, Whole
from medtune.wandb_space import parameters
from medtune.wandb_sweep import configuration, note_over
from medtune.wandb_sync import Uploader, sync
from tests.support.fake_wandb import FakeWandb
from tests.support.wandb_home import KEY, isolate
from tests.support.wandb_trial import play
from tests.test_wandb_sync import quiet, until

SPACE = SearchSpace(
    model=Choice(options=("medmamba_t", "medvit_small")),
    batch_size=Following(by="model", values={"medmamba_t": 64, "medvit_small": 128}),
    optimizer=Choice(options=("adam", "sgd")),
    lr=Real(low=1e-4, high=1e-2, log=True),
    milestones=Milestones(),
    momentum=Real(low=0.0, high=0.9, only_if=("optimizer", "sgd")),
    micro_batch=Whole(low=8, high=16),
)
RECORD = {"id": "st-1", "name": "demo", "selection": "val/loss", "planned": False, "parameters": parameters(SPACE)}


pytestmark = pytest.mark.usefixtures("nobody")


def test_every_kind_of_dimension_has_words():
    space = SearchSpace(**SPACE.dimensions, pretrained=Listed(options=(None, "timm")))
    assert {type(dimension) for dimension in space.dimensions.values()} == set(Dimension.__subclasses__())
    assert parameters(space)["pretrained"] == {"values": [None, "timm"]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study of two trials, of which nothing was uploaded."""
    study = tmp_path_factory.mktemp("written") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, study / "home")
        play(study, 0)
        play(study, 1, last=2, end="PRUNED")
    write_json(study / "study.json", RECORD)
    return study


@pytest.fixture
def study(written, tmp_path):
    return shutil.copytree(written, tmp_path / "demo")


@pytest.fixture
def server(nobody):
    with FakeWandb() as wandb:
        nobody.setenv("WANDB_BASE_URL", wandb.url)
        nobody.setenv("WANDB_API_KEY", KEY)
        yield wandb


def sweeps_of(wandb):
    return {name: run.sweep for name, run in wandb.runs.items()}


class TestConfiguration:
    def test_the_space_in_the_words_of_wandb(self):
        config = configuration(RECORD)
        assert (config["name"], config["method"]) == ("demo", "custom")
        assert config["metric"] == {"name": "best/val/loss", "goal": "minimize"}
        found = config["parameters"]
        assert found["model"] == {"values": ["medmamba_t", "medvit_small"]} and found["batch_size"] == {"values": [64, 128]}
        assert found["lr"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
        assert found["momentum"] == {"distribution": "uniform", "min": 0.0, "max": 0.9}
        assert found["micro_batch"] == {"distribution": "int_uniform", "min": 8, "max": 16}
        assert found["milestones_first"] == {"distribution": "uniform", "min": 0.1, "max": 0.4}
        assert found["milestones_count"] == {"distribution": "int_uniform", "min": 1, "max": 3}

    def test_it_is_one_that_wandb_takes(self):
        from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

        config = configuration(RECORD)
        assert _validate_config_and_fill_distribution(config) == config

    def test_a_plan_is_a_grid_of_its_values(self):
        first = [{"model": model, "seed": seed} for seed in (0, 1) for model in ("a", "b")]
        config = configuration(RECORD | {"planned": True, "first": first, "selection": "val/auc"})
        assert config["method"] == "grid" and config["metric"]["goal"] == "maximize"
        assert config["parameters"] == {"model": {"values": ["a", "b"]}, "seed": {"values": [0, 1]}}

    def test_a_study_of_an_older_medtune_has_none(self):
        assert configuration({k: v for k, v in RECORD.items() if k != "parameters"}) is None


class TestSync:
    def test_one_sweep_with_every_run_however_often_it_is_synced(self, server, study):
        report = sync(study, quiet)
        assert report.ok and list(server.sweeps) == ["sweep1"] and server.sweeps["sweep1"]["project"] == "proj"
        assert sweeps_of(server) == {"st-1-0000": "sweep1", "st-1-0001": "sweep1"}
        assert report.sweep == f"{server.url}/someone/proj/sweeps/sweep1" and report.sweep in report.describe()
        calls = len(server.requests)
        assert sync(study, quiet).ok and len(server.requests) == calls

    def test_what_the_page_draws_is_in_the_runs(self, server, study):
        sync(study, quiet)
        run, config = server.runs["st-1-0000"], server.sweeps["sweep1"]
        assert {"model", "optimizer", "lr", "milestones_first", "milestones_gap", "milestones_count"} <= set(run.settings)
        assert config["metric"]["name"] in run.summary

    def test_a_server_that_refuses_sweeps_loses_no_run_and_gets_them_later(self, server, study):
        server.mode = "no-sweeps"
        report = sync(study, quiet)
        assert report.ok and sorted(report.uploaded) == [0, 1] and "sweeps are not for you" in report.describe()
        assert set(sweeps_of(server).values()) == {None}
        server.mode = "ok"
        report = sync(study, quiet)
        assert report.uploaded == [] and set(sweeps_of(server).values()) == {"sweep1"}

    def test_the_sweep_is_finished_with_the_study_and_takes_a_later_trial(self, server, study, nobody):
        sync(study, quiet)
        assert server.sweeps["sweep1"]["state"] == "PENDING", "a study that may go on"
        note_over(study, True)
        server.mode = "no-states"
        report = sync(study, quiet)
        assert report.ok and "still says that it runs: " in report.describe() and "not for you" in report.left_open
        server.mode = "ok"
        assert sync(study, quiet).ok and server.sweeps["sweep1"]["state"] == "FINISHED"
        calls = len(server.requests)
        assert sync(study, quiet).ok and len(server.requests) == calls
        note_over(study, False)
        play(study, 2)
        nobody.setenv("WANDB_BASE_URL", server.url)
        nobody.setenv("WANDB_API_KEY", KEY)
        assert sync(study, quiet).uploaded == [2] and sweeps_of(server)["st-1-0002"] == "sweep1"
        assert list(server.sweeps) == ["sweep1"] and server.sweeps["sweep1"]["state"] == "RUNNING"

    @pytest.mark.slow
    def test_another_server_has_a_sweep_of_its_own(self, server, study, nobody):
        sync(study, quiet)
        first = json.loads((study / "wandb/sweep.json").read_text())
        for mark in study.glob("wandb/*/uploaded.json"):
            mark.unlink()
        with FakeWandb() as other:
            nobody.setenv("WANDB_BASE_URL", other.url)
            sync(study, quiet)
            assert set(sweeps_of(other).values()) == {"sweep1"}
        assert json.loads((study / "wandb/sweep.json").read_text())["server"] != first["server"]


class TestUploader:
    @pytest.mark.slow
    def test_a_trial_is_in_the_sweep_while_it_runs(self, server, tmp_path):
        write_json(tmp_path / "study.json", RECORD)
        command = [sys.executable, "-m", "tests.support.wandb_trial", tmp_path, "0", "1", "1", "400", "0.1", "COMPLETE"]
        with Uploader(tmp_path, say=quiet, project="proj") as uploader:
            trial = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
            try:
                until(lambda: sweeps_of(server).get("st-1-0000") == "sweep1", 40)
                assert not server.runs["st-1-0000"].complete
            finally:
                trial.kill()
                trial.wait()
            assert uploader.report.sweep

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["no-sweeps", "ok"])
    def test_what_has_ended_is_uploaded_at_the_end_with_or_without_a_sweep(self, server, study, mode):
        server.mode = mode
        note_over(study, True)
        uploader = Uploader(study, say=quiet, project="proj")
        uploader.start()
        report = uploader.stop(20)
        assert report.ok and sorted(report.uploaded) == [0, 1], report.describe()
        assert set(sweeps_of(server).values()) == ({"sweep1"} if mode == "ok" else {None})
        assert [sweep["state"] for sweep in server.sweeps.values()] == (["FINISHED"] if mode == "ok" else [])
