"""The training loop: `fit` yields one `EpochResult` per epoch and knows nothing of who runs it.

All randomness of an epoch comes from (seed, epoch): order, augmentation and stochastic depth have a stream each. So an
interrupted trial continues exactly (bit for bit on CPU) from weights and optimizer state, and nothing depends on what
ran in the process before.

A last batch of a single image joins the batch before it (BatchNorm needs two). Every image is seen once an epoch, unless
classes are drawn evenly (`medtune.data.sampling`).
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune import metrics
from medtune.checkpoint import CheckpointStore, Snapshot
from medtune.config import TrialConfig
from medtune.data import PairData, Split
from medtune.errors import DataError, MedtuneError, TrainingDiverged
from medtune.evaluate import autocast, default_device, eval_batch, figures, logits_of
from medtune.seeding import generator, reproducible

CHECK_EVERY = 50
"""Batches between two looks at the losses; each look waits for the device."""


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What one epoch gave."""

    epoch: int
    """1-based."""
    metrics: dict[str, float | None]
    """`train/*` (on the augmented images, while training) and `val/*`; None where undefined."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a metric is None."""
    lr: float
    """Learning rate of this epoch."""
    seconds: float
    """Training and validation."""
    images_per_second: float
    """Training images over the seconds of training alone."""
    best_epoch: int
    """Best epoch so far by the selection metric; 0: none yet."""
    best_value: float | None
    """The selection metric at the best epoch."""
    improved: bool
    """Whether this epoch is the best one so far."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class DeviceSplit:
    """A split on the device: images uint8 (N, C, H, W), labels int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DeviceData:
    """What training needs of a pair, on the device."""

    train: DeviceSplit
    val: DeviceSplit


def on_device(data: PairData, device: torch.device) -> DeviceData:
    """Move the training and validation images to the device, as they are stored."""

    def move(split: Split) -> DeviceSplit:
        return DeviceSplit(torch.tensor(split.images, device=device), torch.tensor(split.labels, device=device))

    return DeviceData(move(data.train), move(data.val))


def fit(
    config: TrialConfig,
    data: PairData,
    *,
    device: torch.device | None = None,
    checkpoints: CheckpointStore | None = None,
    save_at: Collection[int] = (),
    resident: DeviceData | None = None,
) -> Fit:
    """Train `config` on `data`, from the newest good checkpoint on; iterate to train.

    Checkpoints are written after the epochs in `save_at`, after the last one, and else at least
    `config.checkpoint_seconds` apart. `resident` is `on_device(data, device)` when the caller has it already.
    Raises DataError when the data cannot train or select, CheckpointError when the checkpoint is of another trial;
    iterating raises TrainingDiverged when a loss is not finite.
    """
    return Fit(config, data, device or default_device(), checkpoints, save_at, resident)


class Fit(Iterator[EpochResult]):
    """A trial being trained."""

    def __init__(
        self,
        config: TrialConfig,
        data: PairData,
        device: torch.device,
        checkpoints: CheckpointStore | None,
        save_at: Collection[int],
        resident: DeviceData | None,
    ) -> None:
        _require_trainable(config, data)
        self.config = config
        self.device = device
        self.history: list[EpochResult] = []
        self.best_epoch = 0
        self.best_value: float | None = None
        self._classes = len(data.classes)
        self._fingerprint = {name: data.fingerprint.get(name, "") for name in ("train", "val")}
        self._store = checkpoints
        self._save_at = frozenset(save_at) | {config.epochs}
        self._saved_epoch = 0
        self._saved_time = time.monotonic()
        self._best: dict[str, Tensor] = {}
        self._data: DeviceData | None = resident or on_device(data, device)
        self._val_labels = np.asarray(data.val.labels)
        self._model: nn.Module | None = _build(config, data).to(device)
        self._optimizer: Any = _optimizer(self._model, config, device)
        self._scheduler: Any = torch.optim.lr_scheduler.MultiStepLR(
            self._optimizer, list(config.milestone_epochs()), config.gamma
        )
        if checkpoints is not None:
            self._resume(checkpoints)
        self.start_epoch = self.epoch + 1
        if self.start_epoch > config.epochs:
            self.save()  # nothing is left to train, and the weights may lie with an earlier attempt alone

    @property
    def epoch(self) -> int:
        """Epochs trained so far, earlier attempts included."""
        return self.history[-1].epoch if self.history else 0

    @property
    def model(self) -> nn.Module:
        """The model with its current weights."""
        if self._model is None:
            raise MedtuneError("this training was closed; its model is gone")
        return self._model

    @property
    def best_metrics(self) -> dict[str, float | None]:
        """The metrics of the best epoch; empty when there is none."""
        return self.history[self.best_epoch - 1].metrics if self.best_epoch else {}

    def best_model(self) -> nn.Module:
        """A new model with the weights of the best epoch so far, in eval mode."""
        if not self.best_epoch:
            raise MedtuneError(f"no epoch was best by {self.config.selection} yet: no best weights")
        model = copy.deepcopy(self.model).eval()
        model.load_state_dict(self._best)
        return model

    def __next__(self) -> EpochResult:
        if self._model is None or self.epoch >= self.config.epochs:
            raise StopIteration
        epoch, lr, started = self.epoch + 1, self._optimizer.param_groups[0]["lr"], time.perf_counter()
        try:
            with reproducible(self.device, self.config.seed, epoch, "model"):
                train = self._train_epoch(epoch)
                trained = time.perf_counter()
                val = self._validate(epoch)
        except BaseException:  # half an epoch is not to be gone on from, after Ctrl-C neither
            self._model = None
            raise
        self._scheduler.step()
        found = {**train, **val}
        improved = self._select(epoch, found)
        assert self._data is not None
        result = EpochResult(
            epoch=epoch,
            metrics={name: value for name, value in found.items() if not name.endswith("/reason")},
            missing={name.removesuffix("/reason"): why for name, why in found.items() if name.endswith("/reason")},
            lr=lr,
            seconds=time.perf_counter() - started,
            images_per_second=len(self._data.train.labels) / (trained - started),
            best_epoch=self.best_epoch,
            best_value=self.best_value,
            improved=improved,
        )
        self.history.append(result)
        due = time.monotonic() - self._saved_time >= self.config.checkpoint_seconds
        if due or epoch in self._save_at:
            self.save()
        return result

    def save(self) -> Path | None:
        """Write a checkpoint now; None without a store, or when this epoch has one. Raises CheckpointError."""
        if self._store is None or self.epoch == self._saved_epoch:
            return None
        state = self._optimizer.state_dict()["state"]
        entries = {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}
        path = self._store.save(
            Snapshot(
                epoch=self.epoch,
                config=self.config,
                fingerprint=self._fingerprint,
                model=self.model.state_dict(),
                optimizer={name: value for name, value in entries.items() if isinstance(value, Tensor)},
                best_epoch=self.best_epoch,
                best=self._best,
                progress={
                    "lr": self._optimizer.param_groups[0]["lr"],
                    "best_value": self.best_value,
                    "optimizer": {name: value for name, value in entries.items() if not isinstance(value, Tensor)},
                    "history": [result.to_dict() for result in self.history],
                },
            )
        )
        self._saved_epoch, self._saved_time = self.epoch, time.monotonic()
        return path

    def close(self) -> None:
        """Let go of the model, its optimizer and the images, and give device memory back."""
        self._model = self._data = None
        self._optimizer = self._scheduler = None
        self._best = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _resume(self, store: CheckpointStore) -> None:
        snapshot = store.newest(self.config, self._fingerprint)
        if snapshot is None:
            return
        self.model.load_state_dict(snapshot.model)
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**snapshot.optimizer, **snapshot.progress["optimizer"]}.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        lr = snapshot.progress["lr"]
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        lrs = [lr] * len(self._optimizer.param_groups)
        self._scheduler.load_state_dict({"last_epoch": snapshot.epoch, "_last_lr": lrs})
        self.history = [EpochResult(**values) for values in snapshot.progress["history"]]
        self.best_epoch, self.best_value = snapshot.best_epoch, snapshot.progress["best_value"]
        self._best = {name: tensor.to(self.device) for name, tensor in snapshot.best.items()}

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """`train/loss` is the plain cross entropy, comparable with `val/loss`, also where a weighted one is optimised."""
        from medtune.data.sampling import class_weights, epoch_order
        from medtune.data.transforms import augment, draw

        assert self._data is not None
        model, train, config = self.model, self._data.train, self.config
        count, (height, width) = len(train.labels), train.images.shape[-2:]
        order = epoch_order(train.labels, config.imbalance, generator(config.seed, epoch, "order")).to(self.device)
        weights = class_weights(train.labels, self._classes, config.imbalance)
        chance = generator(config.seed, epoch, "augmentation")
        labels = train.labels[order]
        bounds = batch_bounds(count, config.batch_size)
        losses = torch.zeros(len(bounds), device=self.device)
        logits = torch.empty((count, self._classes), device=self.device)
        model.train()
        for batch, (start, stop) in enumerate(bounds):
            draws = draw(stop - start, height, width, chance, config.augmentation)
            images = augment(train.images[order[start:stop]], config.image_size, draws)
            with autocast(config.precision, self.device):
                output = model(images).float()
            loss = objective = F.cross_entropy(output, labels[start:stop])
            if weights is not None:
                # Over the images, not over their weights: the same whichever images share a batch.
                total = F.cross_entropy(output, labels[start:stop], weight=weights, reduction="sum")
                objective = total / (stop - start)
            self._optimizer.zero_grad(set_to_none=True)
            objective.backward()
            self._optimizer.step()
            losses[batch] = loss.detach()
            logits[start:stop] = output.detach()
            if (batch + 1) % CHECK_EVERY == 0 or batch + 1 == len(bounds):
                _require_finite(losses[: batch + 1], epoch, bounds)
        sizes = [stop - start for start, stop in bounds]
        loss_mean = float(np.average(losses.double().cpu().numpy(), weights=sizes))
        if not torch.isfinite(logits).all():
            raise TrainingDiverged(f"the model's output is not finite at epoch {epoch}. A lower learning rate may help")
        found = figures(logits.cpu(), labels.cpu().numpy(), "train", loss=False)
        return {"train/loss": loss_mean, **found}

    def _validate(self, epoch: int) -> dict[str, Any]:
        assert self._data is not None
        batches = iter(self._data.val.images.split(eval_batch(self.config.image_size, self.device)))
        logits = logits_of(self.model, batches, self.config.image_size, self.device, self.config.precision).cpu()
        if not torch.isfinite(logits).all():
            loss = F.cross_entropy(logits, torch.from_numpy(self._val_labels)).item()
            raise TrainingDiverged(f"val loss is {loss} at epoch {epoch}. A lower learning rate may help")
        return figures(logits, self._val_labels, "val", loss=True)

    def _select(self, epoch: int, found: Mapping[str, Any]) -> bool:
        value = found[self.config.selection]
        sign = -1 if self.config.selection.endswith("/loss") else 1
        if value is None or (self.best_value is not None and sign * value <= sign * self.best_value):
            return False
        self.best_epoch, self.best_value = epoch, value
        state = self.model.state_dict()
        if self._best:
            for name, tensor in state.items():
                self._best[name].copy_(tensor)
        else:
            self._best = {name: tensor.detach().clone() for name, tensor in state.items()}
        return True


def batch_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch; a single image left over joins the batch before."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


def _build(config: TrialConfig, data: PairData) -> nn.Module:
    from medtune import models

    # Drawn on the CPU, so that a seed gives the same weights on every device.
    with reproducible(torch.device("cpu"), config.seed, 0, "weights"):
        return models.build(config.model, num_classes=len(data.classes), in_channels=3)


def _optimizer(model: nn.Module, config: TrialConfig, device: torch.device) -> torch.optim.Optimizer:
    free: set[str] = getattr(model, "no_weight_decay", set)()
    named = dict(model.named_parameters())
    assert free <= named.keys(), f"no_weight_decay names no parameters: {sorted(free - named.keys())}"
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if n not in free], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named.items() if n in free], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = device.type in ("cpu", "cuda")  # one pass over the weights: 8 times faster than without, also on a CPU
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, fused=fused)


def _require_trainable(config: TrialConfig, data: PairData) -> None:
    if len(data.train.labels) < 2:
        raise DataError(f"the training set of {data.name} has {len(data.train.labels)} images; at least 2 are needed")
    name = config.selection.removeprefix("val/")
    reason = metrics.undefined(data.val.labels, len(data.classes)).get(name)
    if len(data.val.labels) == 0:
        reason = "no images"
    if reason:
        raise DataError(f"selection {config.selection} is undefined on the validation split of {data.name}: {reason}")


def _require_finite(losses: Tensor, epoch: int, bounds: list[tuple[int, int]]) -> None:
    values = losses.tolist()
    for batch, value in enumerate(values):
        if not math.isfinite(value):
            start, stop = bounds[batch]
            raise TrainingDiverged(
                f"train loss is {value} at epoch {epoch}, batch {batch + 1} of {len(bounds)} "
                f"(images {start + 1} to {stop} of the epoch). A lower learning rate may help"
            )
