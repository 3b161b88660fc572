"""The training loop: what it computes, that it can be interrupted, and how it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medtune.checkpoint import CheckpointStore
from medtune.config import TrialConfig
from medtune.data import PairData
from medtune.training import fit

Make = Callable[..., TrialConfig]
OPTIMIZERS = [
    {"optimizer": "adam"},
    {"optimizer": "adamw", "weight_decay": 0.01},
    {"optimizer": "sgd", "momentum": 0.9, "lr": 0.01},
    {"optimizer": "sgd", "lr": 0.01},
]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda s: s["optimizer"] + str(s.get("momentum", "")))
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_equals_uninterrupted(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path, settings: dict, stop: int
) -> None:
    config = tiny_config(**settings)
    whole = fit(config, tiny_data, device=torch.device("cpu"))
    expected = [result.metrics for result in whole]

    first = fit(config, tiny_data, device=torch.device("cpu"), checkpoints=CheckpointStore(tmp_path / "1"))
    for _ in range(stop):
        next(first)
    torch.rand(7)
    second = fit(
        config,
        tiny_data,
        device=torch.device("cpu"),
        checkpoints=CheckpointStore(tmp_path / "2", earlier=[tmp_path / "1"]),
    )
    assert second.start_epoch == stop + 1
    rest = list(second)
    assert [result.epoch for result in rest] == list(range(stop + 1, 5))
    assert [result.metrics for result in second.history] == expected
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.best_epoch == second.best_epoch
    for a, b in zip(whole.best_model().parameters(), second.best_model().parameters(), strict=True):
        assert torch.equal(a, b)
