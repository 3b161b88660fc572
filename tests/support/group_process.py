"""One process of a group that trains models together, for tests/test_parallel.py.

Arguments: rank, world, meeting point, folder, device (cpu, cuda), epochs, models.

Stochastic depth is off, as it differs between processes. On `cpu` BatchNorm is frozen, as it cannot be synchronised there,
but of a model whose name ends in `+norm`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import medtune.models
from medtune.checkpoint import CheckpointStore
from medtune.config import TrialConfig
from medtune.data import PairData
from medtune.parallel import SOLO, Group, joined
from medtune.training import Fit, fit
from tests.conftest import split


def calm(build: Callable[..., nn.Module], frozen: bool) -> Callable[..., nn.Module]:
    """`medtune.models.build`, but of models that treat an image the same every time, and alone if `frozen`."""

    def built(*args: Any, **kwargs: Any) -> nn.Module:
        model = build(*args, **kwargs)
        for module in model.modules():
            if frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
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


def train(
    model: str, epochs: int, group: Group = SOLO, store: CheckpointStore | None = None, device: str = "cpu", **changes: Any
) -> Fit:
    """A calm model, trained on for so many epochs."""
    torch.backends.cudnn.allow_tf32 = False
    build = medtune.models.build
    name = model.removesuffix("+norm")
    medtune.models.build = calm(build, frozen=device == "cpu" and name == model)  # type: ignore[assignment]
    place = torch.device(device)
    try:
        fitting = fit(config(name, **changes), data(), device=place, group=group, checkpoints=store, save_at=(1, 2))
        for _ in range(epochs):
            next(fitting)
    finally:
        medtune.models.build = build
    return fitting


@contextlib.contextmanager
def _meeting(group: Group, address: str, device: str) -> Iterator[None]:
    if device == "cpu":
        with joined(group, address, torch.device("cpu"), local=True):
            yield
        return
    # NCCL wants a GPU for each process; over gloo two can share one.
    dist.init_process_group("gloo", init_method=address, rank=group.rank, world_size=group.world)
    yield
    dist.destroy_process_group()


def main() -> None:
    rank, world, address, folder, device, epochs, *models = sys.argv[1:]
    torch.set_num_threads(1)
    group = Group(int(rank), int(world))
    with _meeting(group, address, device):
        for model in models:
            attempt = Path(folder) / model
            attempt.mkdir(exist_ok=True)  # as a trial's process finds it made
            store = CheckpointStore(attempt / f"rank-{rank}")
            fitting = train(model, int(epochs), group, store, device)
            figures = [result.metrics for result in fitting.history]
            (Path(folder) / f"{model}-{rank}.json").write_text(json.dumps(figures))
            if group.leads:
                torch.save(fitting.model.state_dict(), Path(folder) / f"{model}.pt")


if __name__ == "__main__":
    main()
