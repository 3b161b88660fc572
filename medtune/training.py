"""The training loop: `fit` yields one `EpochResult` per epoch and knows nothing of who runs it.

All randomness of an epoch comes from (seed, epoch): order, augmentation and stochastic depth have a stream each. So an
interrupted trial continues exactly (bit for bit on CPU) from weights and optimizer state, and nothing depends on what
ran in the process before.

A last batch of a single image joins the batch before it (BatchNorm needs two). Every image is seen once an epoch, unless
classes are drawn evenly (`medtune.data.sampling`).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune import metrics
from medtune.checkpoint import CheckpointStore, Snapshot
from medtune.config import TrialConfig
from medtune.data import PairData, Split
from medtune.data.sampling import class_weights
from medtune.epoch import DeviceSplit, optimizer_of, train_epoch
from medtune.errors import CheckpointError, DataError, MachineFault, MedtuneError, TrainingDiverged
from medtune.evaluate import default_device, eval_batch, figures, logits_of, shift_figures
from medtune.memory import fewer, is_out_of_memory, least
from medtune.models.layout import to_device
from medtune.parallel import SOLO, Group, synchronised
from medtune.seeding import reproducible
from medtune.steps import Stepper, broken_recording, stepper_of

if TYPE_CHECKING:
    from medtune.data.shifts import Shift


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
    micro_batch: int
    """Images a device computed at once: the batch, its process's share, or what fits into its memory."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


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
    group: Group = SOLO,
    micro_batch: int | None = None,
) -> Fit:
    """Train `config` on `data`, from the newest good checkpoint on; iterate to train.

    Checkpoints are written after the epochs in `save_at`, after the last one, and else at least
    `config.checkpoint_seconds` apart, by the group's first process alone; on a GPU beside the training (`Fit.settle`).
    `resident` is `on_device(data, device)` when the caller has it already. `group`: the processes that train together;
    each calls this with the same arguments.
    `micro_batch`: images to compute at once at most, where less than `config.micro_batch` is known to fit.
    Raises DataError when the data cannot train or select, CheckpointError when the checkpoint is of another trial or the
    weights to start from do not fit; iterating raises TrainingDiverged when a loss is not finite and OutOfMemory when a
    piece of a batch does not fit: go on with a new Fit and a smaller `micro_batch`.
    """
    return Fit(config, data, device or default_device(), checkpoints, save_at, resident, group, micro_batch)


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
        group: Group,
        micro_batch: int | None,
    ) -> None:
        _require_trainable(config, data, group)
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
        # On a CPU writing takes what training has, and who takes a step finds its checkpoint there.
        self._writer = ThreadPoolExecutor(1, "checkpoints") if device.type == "cuda" else None
        self._writing: Future[Path] | None = None
        self._best: dict[str, Tensor] = {}
        self._data: DeviceData | None = resident or on_device(data, device)
        self._val_labels = np.asarray(data.val.labels)
        self._group = group
        built, self.notes = _build(config, data)
        self._model: nn.Module | None = synchronised(to_device(built, device), group, device)
        self.optimizer: Any = optimizer_of(self._model, config, device)
        drops = list(config.milestone_epochs()) if config.schedule == "milestones" else []
        self._scheduler: Any = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, drops, config.gamma)
        self._limit = least(config.micro_batch, micro_batch)
        if checkpoints is not None:
            self._resume(checkpoints)
        found = group.gather((self.epoch, self._limit))
        if len({epoch for epoch, _ in found}) > 1:
            raise MachineFault(f"the trial's processes found different checkpoints; this one found epoch {self.epoch}")
        self._limit = least(*(limit for _, limit in found))
        self.stepper: Stepper | None = self._steps()
        self.start_epoch = self.epoch + 1
        if self.start_epoch > config.epochs:
            self.save()  # nothing is left to train, and the weights may lie with an earlier attempt alone

    @property
    def epoch(self) -> int:
        """Epochs trained so far, earlier attempts included."""
        return self.history[-1].epoch if self.history else 0

    @property
    def micro_batch(self) -> int:
        """Images a device computes at once, at most."""
        share = -(-self.config.batch_size // self._group.world)
        return share if self._limit is None else min(share, self._limit)

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
        epoch, lr, started = self.epoch + 1, self.optimizer.param_groups[0]["lr"], time.perf_counter()
        full = False
        # A stream of its own for each process: they are to drop different branches of different images.
        stream = "model" if self._group.leads else f"model{self._group.rank}"
        try:
            with reproducible(self.device, self.config.seed, epoch, stream):
                train = self._train_epoch(epoch)
                trained = time.perf_counter()
                val = self._validate(epoch)
            found = {**train, **val}
            improved = self._select(epoch, found)
        except BaseException as error:  # half an epoch is not to be gone on from, after Ctrl-C neither
            self._model = self.stepper = None
            full = is_out_of_memory(error)
            if not full:
                raise
        if full:  # raised out here: the error caught holds on to what fills the memory
            raise fewer(self.config, self.device, self.micro_batch)
        self._scheduler.step()
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
            micro_batch=self.micro_batch,
        )
        self.history.append(result)
        due = time.monotonic() - self._saved_time >= self.config.checkpoint_seconds
        if due or epoch in self._save_at:
            self.save()
        return result

    def save(self) -> Path | None:
        """Write a checkpoint now; None without a store, or when this epoch has one. Raises CheckpointError.

        On a GPU the weights are copied now and written meanwhile: `settle` waits, and so does the next save, which then
        raises what went wrong.
        """
        if self._store is None or not self._group.leads or self.epoch == self._saved_epoch:
            return None
        self.settle()
        snapshot = self._snapshot()
        if self._writer is None:
            self._store.save(snapshot)
        else:
            model, optimizer, best = map(_here, (snapshot.model, snapshot.optimizer, snapshot.best))
            copied = replace(snapshot, model=model, optimizer=optimizer, best=best)
            self._writing = self._writer.submit(self._store.save, copied)
        self._saved_epoch, self._saved_time = self.epoch, time.monotonic()
        return self._store.path_of("last", self.epoch)

    def settle(self) -> None:
        """Wait until what was to be saved is on disk. Raises CheckpointError when the disk refused."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _snapshot(self) -> Snapshot:
        state, names = self.optimizer.state_dict()["state"], self._optimized()
        entries = {f"{names[index]}/{key}": value for index, values in state.items() for key, value in values.items()}
        return Snapshot(
            epoch=self.epoch,
            config=self.config,
            fingerprint=self._fingerprint,
            model=self.model.state_dict(),
            optimizer={name: value for name, value in entries.items() if isinstance(value, Tensor)},
            best_epoch=self.best_epoch,
            best=self._best,
            progress={
                "lr": self.optimizer.param_groups[0]["lr"],
                "best_value": self.best_value,
                "micro_batch": self._limit,
                "optimizer": {name: value for name, value in entries.items() if not isinstance(value, Tensor)},
                "history": [result.to_dict() for result in self.history],
            },
        )

    def close(self) -> None:
        """Let go of the model, its optimizer and the images, and give device memory back.

        What was to be saved is; that it could not be is no matter any more: nobody goes on from here.
        """
        with contextlib.suppress(CheckpointError):
            self.settle()
        if self._writer is not None:
            self._writer.shutdown()
        self._model = self.stepper = self._data = None
        self.optimizer = self._scheduler = None
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
        indices = {name: index for index, name in enumerate(self._optimized())}
        for entry, value in {**snapshot.optimizer, **snapshot.progress["optimizer"]}.items():
            name, _, key = entry.partition("/")
            state.setdefault(indices[name], {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        laid_out_alike(self.optimizer)
        lr = snapshot.progress["lr"]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        lrs = [lr] * len(self.optimizer.param_groups)
        self._scheduler.load_state_dict({"last_epoch": snapshot.epoch, "_last_lr": lrs})
        self._limit = least(self._limit, snapshot.progress["micro_batch"])
        self.history = [EpochResult(**values) for values in snapshot.progress["history"]]
        self.best_epoch, self.best_value = snapshot.best_epoch, snapshot.progress["best_value"]
        self._best = {name: tensor.to(self.device) for name, tensor in snapshot.best.items()}

    def _optimized(self) -> list[str]:
        """Names of the parameters, in the optimizer's order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _steps(self) -> Stepper:
        assert self._data is not None
        weights = class_weights(self._data.train.labels, self._classes, self.config.imbalance)
        net, left = self._group.wrap(self.model), (self.config.epochs - self.epoch) * len(self._data.train.labels)
        return stepper_of(net, self.optimizer, self.config, weights, self._group, left)

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        assert self._data is not None and self.stepper is not None
        logits, labels = train_epoch(self.stepper, self._data.train, self.config, self._classes, epoch, self._limit)
        # The loss is that of the images as they were drawn, unweighted: to be compared with val's.
        return figures(logits.cpu(), labels.cpu().numpy(), "train", loss=True)

    def _validate(self, epoch: int) -> dict[str, Any]:
        self._group.share_buffers(self.model)  # what is judged is what is kept: the first process's weights
        found = figures(self._val_logits(epoch, None), self._val_labels, "val", loss=True)
        if self.config.selection.startswith("val_shift/"):
            from medtune.data.shifts import SHIFTS

            logits = torch.cat([self._val_logits(epoch, shift) for shift in SHIFTS.values()])
            found |= shift_figures(logits, self._val_labels)
        return found

    def _val_logits(self, epoch: int, shift: Shift | None) -> Tensor:
        """Logits (N, K) of the val images, shifted or as they are, on the CPU; the same in every process."""
        assert self._data is not None
        images, device, size = self._data.val.images, self.device, self.config.image_size
        first, last = self._group.part(0, len(images))
        whole = torch.zeros((len(images), self._classes), device=device)
        if last > first:
            parts, precision = iter(images[first:last].split(eval_batch(size, device))), self.config.precision
            whole[first:last] = logits_of(self.model, parts, size, device, precision, shift=shift, first=first)
        self._group.add_up(whole)
        logits = whole.cpu()
        if not torch.isfinite(logits).all():
            loss = F.cross_entropy(logits, torch.from_numpy(self._val_labels)).item()
            raise TrainingDiverged(f"val loss is {loss} at epoch {epoch}. A lower learning rate may help")
        return logits

    def _select(self, epoch: int, found: Mapping[str, Any]) -> bool:
        value = found[self.config.selection]
        sign = -1 if self.config.selection.endswith("/loss") else 1
        if value is None or (self.best_value is not None and sign * value <= sign * self.best_value):
            return False
        self.best_epoch, self.best_value = epoch, value
        if not self._group.leads:
            return True
        state = self.model.state_dict()
        if self._best:
            for name, tensor in state.items():
                self._best[name].copy_(tensor)
        else:
            self._best = {name: tensor.detach().clone() for name, tensor in state.items()}
        return True


def _here(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in pinned memory where it can be had: all are under way before the first is waited for."""
    pins = broken_recording() is None
    copies = {name: torch.empty(x.shape, dtype=x.dtype, pin_memory=pins and x.is_cuda) for name, x in tensors.items()}
    for name, copied in copies.items():
        copied.copy_(tensors[name], non_blocking=True)
    if any(x.is_cuda for x in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


def laid_out_alike(optimizer: torch.optim.Optimizer) -> None:
    """Give what an optimizer keeps of a parameter the parameter's strides: fused steps refuse others."""
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                kept[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _build(config: TrialConfig, data: PairData) -> tuple[nn.Module, list[str]]:
    """The model with the weights it starts from, and what there is to say about them."""
    from medtune import models

    # Drawn on the CPU, so that a seed gives the same weights on every device.
    with reproducible(torch.device("cpu"), config.seed, 0, "weights"):
        model = models.build(
            config.model, num_classes=len(data.classes), in_channels=3, patch_momentum=config.patch_momentum
        )
    notes = []
    if config.pretrained is not None:
        notes = models.load_pretrained(config.model, model, config.pretrained)
    if config.activation_checkpointing:
        models.checkpoint_activations(model)
    return model, notes


def _require_trainable(config: TrialConfig, data: PairData, group: Group) -> None:
    if len(data.train.labels) < 2 * group.world:
        each = "" if group.world == 1 else f" for each of {group.world} processes"
        raise DataError(f"the training set of {data.name} has {len(data.train.labels)} images; at least 2 are needed{each}")
    name = config.selection.rpartition("/")[2]
    reason = metrics.undefined(data.val.labels, len(data.classes)).get(name)
    if len(data.val.labels) == 0:
        reason = "no images"
    if reason:
        raise DataError(f"selection {config.selection} is undefined on the validation split of {data.name}: {reason}")
