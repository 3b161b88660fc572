"""One process of a group that trains models together, for tests/test_parallel.py.

Arguments: rank, world, meeting point, folder, models.

BatchNorm is frozen, as it cannot be synchronised on a CPU, and stochastic depth is off, as it differs between processes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import medtune.models
from medtune.checkpoint import CheckpointStore
from medtune.config import TrialConfig
from medtune.data import PairData
from medtune.parallel import SOLO, Group, joined
from medtune.training import Fit, fit
from tests.conftest import split

CPU = torch.device("cpu")


def calm(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`medtune.models.build`, but of models that treat each image alone and the same every time."""

    def built(*args: Any, **kwargs: Any) -> nn.Module:
        model = build(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, assignment]
                module.training = False
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        return model

    return built


def data() -> PairData:
    """9 training images: with batches of 4 the last one of a single image joins the one before."""
    return PairData(
        name="synthetic",
        classes=("normal", "pneumonia"),
        positive=1,
        native_size=28,
        train=split(9),
        val=split(7, seed=1),
        test=split(4, seed=2),
        external=split(4, seed=3),
        external_name="synthetic",
        synthetic=True,
        fingerprint={"train": "a", "val": "b"},
    )


def config(model: str, **changes: Any) -> TrialConfig:
    """Two steps an epoch, two epochs."""
    settings: dict[str, Any] = {
        "pair": "synthetic", "image_size": 32, "epochs": 2, "batch_size": 4, "optimizer": "sgd", "momentum": 0.5, "lr": 0.01,
        "imbalance": "weighted", "clip_norm": 5.0, "augmentation": 0.5, "precision": "fp32",
    }  # fmt: skip
    return TrialConfig(model=model, **{**settings, **changes})


def train(model: str, epochs: int, group: Group = SOLO, store: CheckpointStore | None = None, **changes: Any) -> Fit:
    """A calm model, trained on for so many epochs."""
    build = medtune.models.build
    medtune.models.build = calm(build)  # type: ignore[assignment]
    try:
        fitting = fit(config(model, **changes), data(), device=CPU, group=group, checkpoints=store, save_at=(1, 2))
        for _ in range(epochs):
            next(fitting)
    finally:
        medtune.models.build = build
    return fitting


def main() -> None:
    rank, world, address, folder, *models = sys.argv[1:]
    torch.set_num_threads(1)
    group = Group(int(rank), int(world))
    with joined(group, address, CPU, local=True):
        for model in models:
            store = CheckpointStore(Path(folder) / model / f"rank-{rank}")
            fitting = train(model, 2, group, store)
            figures = [result.metrics for result in fitting.history]
            (Path(folder) / f"{model}-{rank}.json").write_text(json.dumps(figures))
            if group.leads:
                torch.save(fitting.model.state_dict(), Path(folder) / f"{model}.pt")


if __name__ == "__main__":
    main()
