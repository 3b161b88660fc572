"""`medtune wandb`: the calls that make and update a workspace."""

import json
import os
import subprocess
import sys

import pytest

from medtune import cli
from tests.support.fake_wandb import FakeWandb, refusing_url
from tests.support.made_study import MadeStudy
from tests.support.wandb_home import KEY, isolate
from tests.support.wandb_trial import play


@pytest.fixture
def study(tmp_path_factory, tmp_path):
    made = MadeStudy(tmp_path / "made")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("home"))
        play(made.folder, 0)
        patch.setenv("WANDB_API_KEY", KEY)
        yield patch, made.folder


def command(study):
    """In a process of its own: wandb keeps what it was once told of a server."""
    call = [sys.executable, "-m", "medtune.cli", "wandb", str(study)]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_is_made_once_and_then_updated(study):
    patch, folder = study
    with FakeWandb() as wandb:
        patch.setenv("WANDB_BASE_URL", wandb.url)
        said = command(folder)
        (view,) = wandb.views.values()
        assert (view["entityName"], view["projectName"], view["displayName"]) == ("someone", "proj", "medtune made")
        assert said.startswith(f"workspace of study made: {wandb.url}/someone/proj?nw=")
        spec = json.loads(view["spec"])["section"]
        assert "made-1" in json.dumps(spec["runSets"][0]["filters"])
        kinds = [panel["viewType"] for part in spec["panelBankConfig"]["sections"] for panel in part["panels"]]
        drawn = {"Parallel Coordinates Plot", "Parameter Importance", "Scatter Plot", "Bar Chart", "Run History Line Plot"}
        assert drawn <= set(kinds)
        assert "best/val/loss" in view["spec"] and "external/auc" in view["spec"] and "gpu" in view["spec"]
        assert command(folder) == said and len(wandb.views) == 1
        wandb.views.clear()  # the user deleted it
        assert command(folder) != said and len(wandb.views) == 1


def test_without_a_key_the_way_out_is_named(study, capsys):
    patch, folder = study
    patch.delenv("WANDB_API_KEY")
    patch.setenv("WANDB_BASE_URL", refusing_url())
    assert cli.main(["wandb", str(folder)]) == 2
    assert "no W&B key for http://127" in (said := capsys.readouterr().err) and "wandb login" in said


def test_a_server_that_is_gone_is_named(study, capsys):
    patch, folder = study
    patch.setenv("WANDB_BASE_URL", refusing_url())
    assert cli.main(["wandb", str(folder)]) == 2
    assert "does not answer" in capsys.readouterr().err


def test_a_study_without_runs_is_named(study, tmp_path, capsys):
    made = MadeStudy(tmp_path / "bare")
    assert cli.main(["wandb", str(made.folder)]) == 2
    assert "--wandb off" in capsys.readouterr().err
