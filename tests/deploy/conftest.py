"""A study with one trial that was really trained, and its bundle, made once for all tests of this folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from medtune import models, predictions
from medtune.checkpoint import CheckpointStore
from medtune.data import limit, load_pair
from medtune.deploy.export import export
from medtune.deploy.source import find
from medtune.evaluate import external_test, own_test
from medtune.results import Study
from medtune.search.conductor import attempt_folder
from medtune.training import fit
from tests.support.made_study import MadeStudy


@contextlib.contextmanager
def with_tiny() -> Iterator[None]:
    """`tiny` is a model here, and for no other file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._MODULES, "tiny", "tests.support.tiny_model")
        yield


@pytest.fixture(scope="module", autouse=True)
def tiny_is_a_model() -> Iterator[None]:
    with with_tiny():
        yield


def train(folder: Path, model: str, *, image_size: int = 32, epochs: int = 4, train_limit: int | None = 256) -> Study:
    """A study whose trial 0 was trained as trials are, on generated images."""
    torch.set_num_threads(1)
    settings = {"image_size": image_size, "epochs": epochs, "train_limit": train_limit, "external_limit": 64}
    made = MadeStudy(folder, external="synthetic", batch_size=32, resamples=50, precision="fp32", **settings)
    number = made.trial(0.5)
    config = made.config.trial.replace(model=model)
    place = attempt_folder(folder / "trials", number, 1)
    data = limit(load_pair("synthetic"), train_limit=train_limit, external_limit=64)
    run = fit(config, data, device=torch.device("cpu"), checkpoints=CheckpointStore(place / "checkpoints"))
    for _ in run:
        pass
    tests = (own_test(run.best_model(), config, data, run.device), external_test(run.best_model(), config, data, run.device))
    predictions.write(place, {**tests[0]["predictions"], **tests[1]["predictions"]})
    run.close()
    return made.read()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Study:
    with with_tiny():
        return train(tmp_path_factory.mktemp("studies") / "made", "tiny")


@pytest.fixture(scope="session")
def exported(trained: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    with with_tiny():
        export(find(trained, None, None), folder, None, None)
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))

