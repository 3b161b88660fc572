"""The training loop: what it computes, that it can be interrupted, and how it fails."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import medtune.models
from medtune import epoch as epoch_module
from medtune import metrics, training
from medtune.checkpoint import CheckpointStore, Snapshot, best_file
from medtune.config import Selection, TrialConfig
from medtune.data import PairData, transforms
from medtune.epoch import batch_bounds
from medtune.errors import CheckpointError, ConfigError, DataError, MedtuneError, TrainingDiverged
from medtune.evaluate import predict, shift_test
from medtune.training import EpochResult, Fit, fit, on_device
from tests.conftest import OnCuda, TinyNet, split

Make = Callable[..., TrialConfig]
CPU = torch.device("cpu")
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "adam"},
    {"optimizer": "adamw", "weight_decay": 0.01},
    {"optimizer": "sgd", "momentum": 0.9, "lr": 0.01},
    {"optimizer": "sgd", "lr": 0.01},
]


class Spy(CheckpointStore):
    """Remembers the epochs that were saved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epochs: list[int] = []

    def save(self, snapshot: Any) -> Path:
        self.epochs.append(snapshot.epoch)
        return super().save(snapshot)


def run(config: TrialConfig, data: PairData, **kwargs: Any) -> Fit:
    fitting = fit(config, data, device=CPU, **kwargs)
    for _ in fitting:
        pass
    return fitting


def figures(fitting: Fit) -> list[dict[str, float | None]]:
    return [result.metrics for result in fitting.history]


def assert_same(one: Fit, other: Fit) -> None:
    """Equal bit for bit: figures, current weights, best weights."""
    assert figures(one) == figures(other)
    assert [r.lr for r in one.history] == [r.lr for r in other.history]
    assert (one.best_epoch, one.best_value) == (other.best_epoch, other.best_value)
    for a, b in ((one.model, other.model), (one.best_model(), other.best_model())):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda s: s["optimizer"] + str(s.get("momentum", "")))
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_equals_uninterrupted(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path, settings: dict[str, Any], stop: int
) -> None:
    config = tiny_config(**settings)
    first = fit(config, tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path / "1"))
    for _ in range(stop):
        next(first)
    torch.rand(7)
    store = CheckpointStore(tmp_path / "2", earlier=[tmp_path / "1"])
    second = fit(config, tiny_data, device=CPU, checkpoints=store)
    assert second.start_epoch == stop + 1
    assert [result.epoch for result in second] == list(range(stop + 1, 5))
    assert_same(run(config, tiny_data), second)


def test_interrupted_at_every_epoch_with_damage_equals_uninterrupted(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path
) -> None:
    config = tiny_config(epochs=6)
    folders: list[Path] = []
    for attempt in range(6):
        folders.insert(0, tmp_path / str(attempt))
        fitting = fit(config, tiny_data, device=CPU, checkpoints=CheckpointStore(folders[0], earlier=folders[1:]))
        next(fitting)
        if attempt == 3:
            newest = folders[0] / "last-0004.safetensors"
            newest.write_bytes(newest.read_bytes()[:-1])
    store = CheckpointStore(tmp_path / "end", earlier=folders)
    last = run(config, tiny_data, checkpoints=store)
    assert last.start_epoch == 6  # the fourth epoch was trained twice
    assert_same(run(config, tiny_data), last)


def test_real_model_with_stochastic_depth_resumes_exactly(tmp_path: Path, tiny_data: PairData) -> None:
    torch.set_num_threads(1)
    config = TrialConfig(model="medmamba_t", pair="synthetic", image_size=28, epochs=2, batch_size=4, lr=1e-4)
    data = dataclasses.replace(tiny_data, train=split(8), val=split(4, seed=1))
    next(fit(config, data, device=CPU, checkpoints=CheckpointStore(tmp_path), save_at=[1]))
    resumed = run(config, data, checkpoints=CheckpointStore(tmp_path))
    assert resumed.start_epoch == 2
    assert_same(run(config, data), resumed)


def test_one_seed_gives_one_result_whatever_ran_before(tiny_config: Make, tiny_data: PairData) -> None:
    first = run(tiny_config(seed=3), tiny_data)
    run(tiny_config(optimizer="sgd"), tiny_data)
    torch.manual_seed(99)
    np.random.seed(99)
    assert_same(first, run(tiny_config(seed=3), tiny_data))
    assert figures(first) != figures(run(tiny_config(seed=4), tiny_data))


def test_callers_random_numbers_and_settings_are_left_alone(tiny_config: Make, tiny_data: PairData) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fitting = fit(tiny_config(), tiny_data, device=CPU)
    next(fitting)
    fitting.best_model()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "tiny2"},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd"},
        {"lr": 1e-2},
        {"milestones": (0.25,)},
        {"gamma": 0.5},
        {"batch_size": 8},
        {"weight_decay": 0.1},
        {"image_size": 32},
        {"augmentation": 0.5},
    ],
    ids=str,
)
def test_each_setting_changes_what_is_trained(tiny_config: Make, tiny_data: PairData, change: dict[str, Any]) -> None:
    assert figures(run(tiny_config(), tiny_data)) != figures(run(tiny_config(**change), tiny_data))


def test_momentum_is_that_of_sgd_alone(tiny_config: Make, tiny_data: PairData) -> None:
    plain, heavy = (run(tiny_config(optimizer="sgd", momentum=m), tiny_data) for m in (0.0, 0.9))
    assert figures(plain) != figures(heavy)
    assert figures(run(tiny_config(momentum=0.9), tiny_data)) == figures(run(tiny_config(), tiny_data))


def test_learning_rate_drops_at_the_milestones(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    config = tiny_config(epochs=10, milestones=(0.2, 0.5), gamma=0.1, lr=0.1)
    wanted = [0.1] * 2 + [0.01] * 3 + [0.001] * 5
    assert [result.lr for result in fit(config, tiny_data, device=CPU)] == pytest.approx(wanted)
    for stop in (1, 2, 3, 5):
        store = CheckpointStore(tmp_path / str(stop))
        first = fit(config, tiny_data, device=CPU, checkpoints=store)
        for _ in range(stop):
            next(first)
        rest = fit(config, tiny_data, device=CPU, checkpoints=store)
        assert [result.lr for result in rest] == pytest.approx(wanted[stop:])


def test_dropped_learning_rate_is_the_one_that_moves_the_weights(tiny_config: Make, tiny_data: PairData) -> None:
    config = tiny_config(optimizer="sgd", lr=0.1, gamma=1e-6, milestones=(0.5,), epochs=4)
    fitting, moves = fit(config, tiny_data, device=CPU), []
    before = fitting.model.state_dict()["head.weight"].clone()
    for _ in fitting:
        after = fitting.model.state_dict()["head.weight"].clone()
        moves.append((after - before).abs().max().item())
        before = after
    assert min(moves[:2]) > 1e-3 and max(moves[2:]) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_spares_what_the_model_names(tiny_config: Make, tiny_data: PairData, optimizer: str) -> None:
    config = tiny_config(optimizer=optimizer, weight_decay=100.0, milestones=())  # each of 12 steps takes off a tenth
    fitting = fit(config, tiny_data, device=CPU)
    before = {name: value.detach().clone() for name, value in fitting.model.named_parameters()}
    for _ in fitting:
        pass
    after = dict(fitting.model.named_parameters())
    assert after["scale"].item() > 0.9
    assert after["features.1.weight"].abs().mean() < 0.4 * before["features.1.weight"].abs().mean()


def test_batches_hold_every_image_once() -> None:
    assert batch_bounds(49, 16) == [(0, 16), (16, 32), (32, 49)]
    assert batch_bounds(48, 16) == [(0, 16), (16, 32), (32, 48)]
    assert batch_bounds(50, 16) == [(0, 16), (16, 32), (32, 48), (48, 50)]
    assert batch_bounds(3, 16) == [(0, 3)]
    assert batch_bounds(3, 2) == [(0, 3)]


def test_order_and_augmentation_differ_between_epochs_and_labels_stay_with_their_images(
    tiny_config: Make, tiny_data: PairData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    draws: list[tuple[int, ...]] = []
    labels: list[torch.Tensor] = []
    real = torch.nn.functional.cross_entropy

    def loss(logits: torch.Tensor, truth: torch.Tensor, **settings: Any) -> torch.Tensor:
        labels.append(truth)
        return real(logits, truth, **settings)

    def augment(images: torch.Tensor, size: int, drawn: transforms.Draws, compiles: bool) -> torch.Tensor:
        seen.append(images.double().mean(dim=(1, 2, 3)))
        draws.append(tuple(drawn.boxes.flatten().tolist()))
        return transforms.prepare(images, size)

    monkeypatch.setattr(transforms, "augment", augment)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", loss)
    run(tiny_config(), tiny_data)
    own = torch.tensor(tiny_data.train.labels)
    epochs = [torch.cat(seen[3 * i : 3 * i + 3]) for i in range(4)]
    everything = torch.tensor(tiny_data.train.images).double().mean(dim=(1, 2, 3))
    for index, epoch in enumerate(epochs):
        assert torch.equal(epoch.sort().values, everything.sort().values)
        assert torch.equal(torch.cat(labels[3 * index : 3 * index + 3])[epoch.argsort()], own[everything.argsort()])
    assert not torch.equal(epochs[0], epochs[1])
    assert len(set(draws)) == len(draws)


def uneven(data: PairData, small: int = 9) -> PairData:
    """All of class 0's training images and a few of class 1's."""
    own = data.train
    kept = np.sort(np.concatenate([np.flatnonzero(own.labels == 0), np.flatnonzero(own.labels == 1)[:small]]))
    return dataclasses.replace(data, train=own.take(kept))


def test_weighted_loss_is_optimised_and_the_plain_one_reported(
    tiny_config: Make, tiny_data: PairData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 images against 9: weights 0.68 and 1.89. The step is that of the mean of weighted losses."""
    data = uneven(tiny_data)
    config = tiny_config(optimizer="sgd", lr=0.01, batch_size=34, epochs=1, imbalance="weighted")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = torch.nn.functional.cross_entropy

    def spy(logits: torch.Tensor, truth: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if "weight" in kwargs:
            seen.append((logits, truth))
        return real(logits, truth, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    fitting = fit(config, data, device=CPU)
    before = [parameter.detach().clone() for parameter in fitting.model.parameters()]
    fitting.model.register_forward_hook(lambda model, images, output: output.retain_grad() if model.training else None)
    result = next(fitting)
    logits, truth = seen[0]
    assert result.metrics["train/loss"] == pytest.approx(real(logits, truth).item(), rel=1e-6)
    weights = torch.tensor([34 / (2 * 25), 34 / (2 * 9)])[truth]
    wanted = (metrics.softmax(logits.detach()) - np.eye(2)[truth]) * weights.numpy()[:, None] / 34
    assert logits.grad is not None and np.allclose(logits.grad.numpy(), wanted, atol=1e-7)
    assert not all(torch.equal(a, b) for a, b in zip(before, fitting.model.parameters(), strict=True))


@pytest.mark.parametrize("imbalance", ["weighted", "balanced"])
def test_imbalance_changes_what_is_trained(tiny_config: Make, tiny_data: PairData, imbalance: str) -> None:
    data = uneven(tiny_data)
    assert figures(run(tiny_config(), data)) != figures(run(tiny_config(imbalance=imbalance), data))
    assert_same(run(tiny_config(imbalance=imbalance), data), run(tiny_config(imbalance=imbalance), data))


def test_train_figures_are_those_of_the_augmented_images_while_training(
    tiny_config: Make, tiny_data: PairData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = torch.nn.functional.cross_entropy

    def spy(logits: torch.Tensor, labels: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append((logits.detach().clone(), labels.clone()))
        return real(logits, labels, **settings)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    fitting = fit(tiny_config(), tiny_data, device=CPU)
    modes: list[bool] = []
    fitting.model.register_forward_hook(lambda model, images, output: modes.append(model.training))
    result = next(fitting)
    assert modes == [True, True, True, False]
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))
    assert len(labels) == 49
    wanted = metrics.classification(metrics.softmax(logits), labels)
    assert {name: result.metrics[f"train/{name}"] for name in metrics.NAMES} == pytest.approx(wanted, abs=1e-12)
    assert result.metrics["train/loss"] == pytest.approx(metrics.cross_entropy(logits, labels), rel=1e-6)


def test_val_figures_are_those_of_the_model_after_the_epoch(tiny_config: Make, tiny_data: PairData) -> None:
    fitting = fit(tiny_config(), tiny_data, device=CPU)
    result = next(fitting)
    logits = predict(fitting.model, tiny_data.val, 28, CPU).numpy()
    labels = tiny_data.val.labels
    wanted = {"loss": metrics.cross_entropy(logits, labels)}
    wanted |= metrics.classification(metrics.softmax(logits), labels)
    assert {name: result.metrics[f"val/{name}"] for name in wanted} == wanted


@pytest.mark.parametrize("selection", get_args(Selection))
def test_best_epoch_is_the_first_best_one(tiny_config: Make, tiny_data: PairData, selection: str) -> None:
    fitting = fit(tiny_config(selection=selection, epochs=8, lr=0.02), tiny_data, device=CPU)
    values: list[float] = []
    for result in fitting:
        values.append(result.metrics[selection])  # type: ignore[arg-type]
        best = min(values) if selection.endswith("/loss") else max(values)
        assert (result.best_value, result.best_epoch) == (best, values.index(best) + 1)
        assert result.improved == (result.best_epoch == result.epoch)
        assert fitting.best_metrics[selection] == best
    model = fitting.best_model()
    assert not model.training
    logits = predict(model, tiny_data.val, 28, CPU).numpy()
    found = metrics.classification(metrics.softmax(logits), tiny_data.val.labels)
    found["loss"] = metrics.cross_entropy(logits, tiny_data.val.labels)
    found = {f"val/{name}": value for name, value in found.items()} | shift_test(model, fitting.config, tiny_data, CPU)
    assert found[selection] == best


def test_best_model_does_not_follow_later_training(tiny_config: Make, tiny_data: PairData) -> None:
    fitting = fit(tiny_config(), tiny_data, device=CPU)
    with pytest.raises(MedtuneError, match="no epoch was best"):
        fitting.best_model()
    next(fitting)
    model = fitting.best_model()
    before = model.state_dict()["head.weight"].clone()
    next(fitting)
    assert torch.equal(model.state_dict()["head.weight"], before)


def test_one_class_in_val_leaves_figures_missing(tiny_config: Make, tiny_data: PairData) -> None:
    lonely = dataclasses.replace(tiny_data, val=dataclasses.replace(tiny_data.val, labels=np.ones(20, dtype=np.int64)))
    result = next(fit(tiny_config(), lonely, device=CPU))
    assert result.metrics["val/auc"] is None and result.metrics["val/specificity"] is None
    assert result.missing == dict.fromkeys(("val/auc", "val/specificity"), "no image of class 0")
    assert result.metrics["val/loss"] is not None and result.best_epoch == 1
    with pytest.raises(DataError, match=r"val/auc is undefined on the validation split .*no image of class 0"):
        fit(tiny_config(selection="val/auc"), lonely, device=CPU)


def test_more_than_two_classes(tiny_config: Make, tiny_data: PairData) -> None:
    three = dataclasses.replace(
        tiny_data, classes=("a", "b", "c"), train=split(30, classes=3), val=split(12, seed=1, classes=3)
    )
    result = next(fit(tiny_config(), three, device=CPU))
    assert all(value is not None for value in result.metrics.values())


def test_a_single_training_image_is_refused(tiny_config: Make, tiny_data: PairData) -> None:
    with pytest.raises(DataError, match="has 1 images; at least 2"):
        fit(tiny_config(), dataclasses.replace(tiny_data, train=split(1)), device=CPU)


class Poisoned(TinyNet):
    """Gives NaN from its n-th training batch on, or whenever it evaluates."""

    poison: int = 10**9
    in_eval = False
    batches = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            type(self).batches += 1
        bad = self.batches >= self.poison if self.training else self.in_eval
        return super().forward(images) * (torch.nan if bad else 1.0)


@pytest.fixture
def poisoned(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> type[Poisoned]:
    class Fresh(Poisoned):
        pass

    monkeypatch.setattr(medtune.models, "build", lambda name, num_classes, in_channels, **_: Fresh(num_classes, in_channels))
    return Fresh


def test_loss_that_is_not_finite_names_epoch_and_batch(
    tiny_config: Make, tiny_data: PairData, poisoned: type[Poisoned]
) -> None:
    poisoned.poison = 5  # three batches an epoch
    fitting = fit(tiny_config(), tiny_data, device=CPU)
    assert next(fitting).epoch == 1
    with pytest.raises(TrainingDiverged) as error:
        next(fitting)
    assert "train loss is nan at epoch 2, batch 2 of 3 (images 17 to 32 of the epoch)" in str(error.value)
    assert next(fitting, None) is None
    fitting.close()


def test_loss_is_looked_at_within_the_epoch(
    tiny_config: Make, tiny_data: PairData, poisoned: type[Poisoned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch_module, "CHECK_EVERY", 4)
    poisoned.poison = 2
    with pytest.raises(TrainingDiverged, match="batch 2 of 24"):
        next(fit(tiny_config(batch_size=2), tiny_data, device=CPU))
    assert poisoned.batches == 4


def test_val_loss_that_is_not_finite(tiny_config: Make, tiny_data: PairData, poisoned: type[Poisoned]) -> None:
    poisoned.in_eval = True
    with pytest.raises(TrainingDiverged, match="val loss is nan at epoch 1"):
        next(fit(tiny_config(), tiny_data, device=CPU))


def test_half_an_epoch_is_not_gone_on_from(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C within the second epoch: the object is spent, a new one goes on from the first epoch's checkpoint."""
    fitting = fit(tiny_config(), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path))
    next(fitting)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "figures", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(fitting)
    assert list(fitting) == []
    resumed = run(tiny_config(), tiny_data, checkpoints=CheckpointStore(tmp_path))
    assert resumed.start_epoch == 2
    assert_same(run(tiny_config(), tiny_data), resumed)


def test_learning_rate_that_is_too_high_diverges_by_name(tiny_config: Make, tiny_data: PairData) -> None:
    with pytest.raises(TrainingDiverged, match=r"loss is (nan|inf) at epoch"):
        run(tiny_config(optimizer="sgd", lr=1.0, weight_decay=1e6, epochs=8), tiny_data)


def test_checkpoints_at_the_asked_epochs_and_the_last(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    store = Spy(tmp_path)
    run(tiny_config(epochs=6, checkpoint_seconds=1e6), tiny_data, checkpoints=store, save_at=[2, 3])
    assert store.epochs == [2, 3, 6]


def test_checkpoints_are_some_seconds_apart(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = Spy(tmp_path)
    fitting = fit(tiny_config(epochs=8, checkpoint_seconds=25), tiny_data, device=CPU, checkpoints=store, save_at=[4])
    for _ in range(8):
        now[0] += 10
        next(fitting)
    assert store.epochs == [3, 4, 7, 8]  # 30 s, asked for, 30 s, last


def test_checkpoint_is_there_when_the_epoch_is_given(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    for result in fit(tiny_config(), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path)):
        assert (tmp_path / f"last-{result.epoch:04d}.safetensors").exists()


def test_save_now(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    fitting = fit(tiny_config(checkpoint_seconds=1e6), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path))
    assert fitting.save() is None
    next(fitting)
    assert fitting.save() == tmp_path / "last-0001.safetensors"
    assert fitting.save() is None
    without = fit(tiny_config(), tiny_data, device=CPU)
    next(without)
    assert without.save() is None


def test_history_comes_back_with_the_checkpoint(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    first = fit(tiny_config(), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path))
    results = [next(first), next(first)]
    second = fit(tiny_config(), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path))
    assert second.history == results
    assert EpochResult(**json.loads(json.dumps(results[0].to_dict()))) == results[0]


def test_finished_trial_brings_its_best_weights_along(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    done = run(tiny_config(), tiny_data, checkpoints=CheckpointStore(tmp_path / "1"))
    store = CheckpointStore(tmp_path / "2", earlier=[tmp_path / "1"])
    again = fit(tiny_config(), tiny_data, device=CPU, checkpoints=store)
    assert (again.start_epoch, list(again)) == (5, [])
    assert_same(done, again)
    assert best_file(tmp_path / "2") is not None


def test_checkpoint_of_another_trial_is_refused(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    run(tiny_config(), tiny_data, checkpoints=CheckpointStore(tmp_path))
    with pytest.raises(CheckpointError, match=r"lr was 0.001, is 0.5"):
        fit(tiny_config(lr=0.5), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path))
    other = dataclasses.replace(tiny_data, fingerprint={**tiny_data.fingerprint, "train": "z"})
    with pytest.raises(CheckpointError, match="data are other ones"):
        fit(tiny_config(), other, device=CPU, checkpoints=CheckpointStore(tmp_path))


def test_checkpoints_are_written_beside_training_and_settled(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. What is written is what was there when it was asked for, whatever training did meanwhile."""
    config = tiny_config(checkpoint_seconds=0.0)
    gate, real = threading.Event(), CheckpointStore.save

    def slow(store: CheckpointStore, snapshot: Snapshot) -> Path:
        gate.wait(20)
        return real(store, snapshot)

    monkeypatch.setattr(CheckpointStore, "save", slow)
    store = CheckpointStore(tmp_path)
    fitting = fit(config, tiny_data, device=CPU, checkpoints=store)
    fitting._writer = ThreadPoolExecutor(1)
    next(fitting)
    weights = {name: value.clone() for name, value in fitting.model.state_dict().items()}
    assert not list(tmp_path.iterdir()), "training did not wait"
    with torch.no_grad():
        for parameter in fitting.model.parameters():
            parameter.zero_()
    gate.set()
    fitting.settle()
    found = store.newest(config, {name: tiny_data.fingerprint.get(name, "") for name in ("train", "val")})
    assert found is not None and found.epoch == 1
    assert all(torch.equal(found.model[name], value) for name, value in weights.items())


def test_a_checkpoint_that_could_not_be_written_is_told_when_it_is_waited_for(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path
) -> None:
    fitting = fit(tiny_config(epochs=1), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path / "no" / "folder"))
    fitting._writer = ThreadPoolExecutor(1)
    next(fitting)
    with pytest.raises(CheckpointError, match="cannot write"):
        fitting.settle()
    fitting.close()


def test_closed_training_holds_nothing(tiny_config: Make, tiny_data: PairData) -> None:
    fitting = fit(tiny_config(), tiny_data, device=CPU)
    next(fitting)
    held: list[Callable[[], Any]] = [weakref.ref(fitting.model)]
    held += [weakref.ref(parameter) for parameter in fitting.model.parameters()]
    fitting.close()
    fitting.close()
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)
    assert next(fitting, None) is None
    with pytest.raises(MedtuneError, match="closed"):
        _ = fitting.model


def test_images_already_on_the_device_are_used(tiny_config: Make, tiny_data: PairData) -> None:
    resident = on_device(tiny_data, CPU)
    assert_same(run(tiny_config(), tiny_data), run(tiny_config(), tiny_data, resident=resident))
    empty = dataclasses.replace(resident, val=dataclasses.replace(resident.val, images=resident.val.images * 0))
    assert figures(run(tiny_config(), tiny_data, resident=empty)) != figures(run(tiny_config(), tiny_data))


def test_bf16_on_cpu_trains(tiny_config: Make, tiny_data: PairData) -> None:
    assert figures(run(tiny_config(precision="bf16"), tiny_data)) != figures(run(tiny_config(), tiny_data))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_epoch_does_not_wait_for_the_device(tiny_config: Make, tiny_data: PairData) -> None:
    def waits(batch_size: int) -> int:
        fitting = fit(tiny_config(batch_size=batch_size), tiny_data, device=torch.device("cuda"))
        next(fitting)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                next(fitting)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(entry.message) for entry in caught)

    assert waits(2) == waits(24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_memory_is_given_back(tiny_config: Make, tiny_data: PairData, tmp_path: Path) -> None:
    held = []
    for attempt in range(4):
        fitting = fit(
            tiny_config(), tiny_data, device=torch.device("cuda"), checkpoints=CheckpointStore(tmp_path / str(attempt))
        )
        for _ in fitting:
            pass
        fitting.close()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[0]


@pytest.mark.parametrize(("broken", "pinned"), [(None, True), ("RuntimeError: asks the device", False)])
def test_what_is_saved_is_not_pinned_where_a_recording_broke_off(
    monkeypatch: pytest.MonkeyPatch, broken: str | None, pinned: bool
) -> None:
    """PyTorch's allocator of pinned memory may then refuse (`medtune.steps.broken_recording`)."""
    asked, empty = [], torch.empty

    def without(*shape: Any, pin_memory: bool, **kind: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*shape, **kind)

    monkeypatch.setattr("medtune.steps._broken", broken)
    monkeypatch.setattr(torch, "empty", without)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    copied = training._here({"weight": torch.ones(3).as_subclass(OnCuda)})
    assert asked == [pinned] and copied["weight"].tolist() == [1, 1, 1]


def test_models_without_decay_exceptions_train(
    tiny_config: Make, tiny_data: PairData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(name: str, num_classes: int, in_channels: int, **_: Any) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))

    monkeypatch.setattr(medtune.models, "build", build)
    assert len(run(tiny_config(), tiny_data).history) == 4


def test_a_constant_schedule_never_drops_the_rate(tiny_config: Make, tiny_data: PairData) -> None:
    """As when the report's scripts ran; gamma then changes nothing."""
    stepped, constant = run(tiny_config(), tiny_data), run(tiny_config(schedule="constant"), tiny_data)
    assert {result.lr for result in constant.history} == {1e-3} and len({result.lr for result in stepped.history}) > 1
    assert_same(constant, run(tiny_config(schedule="constant", gamma=0.5), tiny_data))


def test_gradients_are_clipped(tiny_config: Make, tiny_data: PairData) -> None:
    """Plain gradient descent moves the weights by lr times the gradient's norm."""
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.5, "epochs": 1, "batch_size": 64}
    moved = {}
    for clip in (None, 0.01):
        fitting = fit(tiny_config(clip_norm=clip, **settings), tiny_data, device=CPU)
        before = [p.detach().clone() for p in fitting.model.parameters()]
        next(fitting)
        moves = [(p - q).square().sum() for p, q in zip(fitting.model.parameters(), before, strict=True)]
        moved[clip] = torch.stack(moves).sum().sqrt().item()
    assert moved[0.01] == pytest.approx(0.5 * 0.01, rel=1e-3) and moved[None] > 0.01


REAL: dict[str, Any] = {"pair": "synthetic", "image_size": 28, "epochs": 1, "batch_size": 4, "lr": 1e-4}


@pytest.fixture
def few(tiny_data: PairData) -> PairData:
    return dataclasses.replace(tiny_data, train=split(8), val=split(4, seed=1))


def test_activation_checkpointing_changes_no_result(few: PairData) -> None:
    config = TrialConfig(model="resnet50", **REAL)
    assert_same(run(config, few), run(config.replace(activation_checkpointing=True), few))


def test_patch_momentum_changes_what_is_trained_and_can_be_repeated(few: PairData) -> None:
    config = TrialConfig(model="medvit_small", **REAL)
    mixed = run(config.replace(patch_momentum=True), few)
    assert figures(mixed) != figures(run(config, few))
    assert_same(mixed, run(config.replace(patch_momentum=True), few))
    with pytest.raises(ConfigError, match="patch_momentum is for MedViT alone, got model 'resnet50'"):
        TrialConfig(model="resnet50", patch_momentum=True, **REAL)


def test_a_pretrained_start_is_started_from(few: PairData, tmp_path: Path) -> None:
    """For other classes: all but the classifier."""
    torch.manual_seed(5)
    theirs = medtune.models.build("resnet50", num_classes=9)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    config = TrialConfig(model="resnet50", pretrained=str(tmp_path / "theirs.pth"), **REAL)
    fitting = fit(config, few, device=CPU)
    assert torch.equal(fitting.model.state_dict()["conv1.weight"], theirs.state_dict()["conv1.weight"])
    assert fitting.model.state_dict()["fc.weight"].shape[0] == 2
    assert fitting.notes == ["classifier fc was for 9 classes: a new one for 2 takes its place"]
