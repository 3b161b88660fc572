"""Fixtures shared by the tests: a model and data small enough for many trainings a second."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import medtune.models
from medtune.config import TrialConfig
from medtune.data import PairData, Split
from medtune.storage import patience
from tests.support.wandb_home import isolate


class TinyNet(nn.Module):
    """Convolution, BatchNorm, dropout (torch's global RNG, as stochastic depth) and a head."""

    def __init__(self, num_classes: int, in_channels: int, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(in_channels, width, 5, stride=4), nn.BatchNorm2d(width), nn.ReLU())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, num_classes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.features(images).mean(dim=(2, 3)))) * self.scale

    def no_weight_decay(self) -> set[str]:
        return {"scale"}


class OnCuda(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Computes with one thread, as CI's machines have few cores; a module asks for it with `pytestmark`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrialConfig]:
    """Makes TrialConfigs of the models "tiny" and "tiny2", which `medtune.models` knows during the test."""
    widths = {"tiny": 8, "tiny2": 12}
    monkeypatch.setattr(medtune.models, "available", lambda: tuple(widths))
    monkeypatch.setattr(
        medtune.models,
        "build",
        lambda name, num_classes=2, in_channels=3, **_: TinyNet(num_classes, in_channels, widths[name]),
    )
    torch.set_num_threads(1)

    def make(**changes: Any) -> TrialConfig:
        defaults = {
            "model": "tiny",
            "pair": "synthetic",
            "image_size": 28,
            "epochs": 4,
            "batch_size": 16,
            "checkpoint_seconds": 0.0,
            "resamples": 50,
        }
        return TrialConfig(**{**defaults, **changes})

    return make


def split(count: int, side: int = 28, seed: int = 0, classes: int = 2) -> Split:
    """Images whose brightness tells the class, with enough noise that not all is right."""
    rng = np.random.default_rng([seed, count, side])
    labels = np.arange(count) % classes
    levels = rng.normal(110 + 35 * labels[:, None, None, None], 60, (count, 1, side, side))
    shift = rng.normal(0, 30, (count, 1, 1, 1))
    return Split((levels + shift).clip(0, 255).astype(np.uint8), labels.astype(np.int64))


@pytest.fixture
def tiny_data() -> PairData:
    """49 training images (with batches of 16 a single one is left over), an external set of 40 x 40 px."""
    return PairData(
        name="synthetic",
        classes=("normal", "pneumonia"),
        positive=1,
        native_size=28,
        train=split(49),
        val=split(20, seed=1),
        test=split(22, seed=2),
        external=split(30, side=40, seed=3),
        external_name="synthetic",
        verified_cpn=False,
        synthetic=True,
        warnings=(),
        fingerprint={"train": "a", "val": "b", "test": "c", "external": "d"},
    )


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_looked_through() -> None:
    """What earlier files of tests left, gigabytes of it, costs each full collection of a trial's end most of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def nobody_waits_for_earlier_tests_storage() -> Iterator[None]:
    """A trial's process writes with its study's patience for good; files of tests come to a process in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "_current", None)
        yield


@pytest.fixture
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """W&B knows nothing of this machine's user; what else a test sets through it goes when it ends."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("home"))
        yield patch


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images to validate and test on: the attempt is what is tested."""
    from medtune import trial as trial_module

    whole = trial_module._data

    def few(*args: Any) -> PairData:
        data = whole(*args)
        part = {name: getattr(data, name).take(np.arange(0, 64, 2)) for name in ("val", "test")}
        return replace(data, **part)

    monkeypatch.setattr(trial_module, "_data", few)
