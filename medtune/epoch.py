"""One pass over the training images: batches, the pieces that are computed at once, and the optimizer's steps.

A batch is shared among the processes of the group, and each share is computed in pieces of at most `micro_batch` images
whose gradients add up: the optimizer's step is that of the whole batch, whatever the group and the pieces. BatchNorm sees
the difference: its statistics are those of a piece (of all processes' pieces, on GPUs). And a last batch with fewer than two
images for each process joins the one before, so that an epoch may have one step less in a group.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medtune.config import TrialConfig
from medtune.errors import TrainingDiverged
from medtune.parallel import SOLO, Group
from medtune.seeding import generator
from medtune.steps import Batch, Stepper

CHECK_EVERY = 50
"""Batches between two looks at the losses on a CPU."""


@dataclass(frozen=True)
class DeviceSplit:
    """A split on the device: images uint8 (N, C, H, W), labels int64 (N,)."""

    images: Tensor
    labels: Tensor


def batch_bounds(count: int, size: int, least: int = 2) -> list[tuple[int, int]]:
    """(start, stop) of each batch; a last one of fewer than `least` images joins the one before."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


def pieces(start: int, stop: int, most: int | None, group: Group = SOLO) -> list[tuple[int, int]]:
    """This process's share of the batch [start, stop) in even pieces of at most `most` images.

    Of one more where that would leave an image alone, of two more where shares of three and of four images go together:
    there are as many pieces in every process, as synchronised BatchNorm needs.
    """
    first, last = group.part(start, stop)
    largest, smallest = -(-(stop - start) // group.world), (stop - start) // group.world
    parts = 1 if most is None else max(1, min(math.ceil(largest / most), smallest // 2))
    marks = [first + (last - first) * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(marks))


def train_epoch(
    stepper: Stepper, train: DeviceSplit, config: TrialConfig, classes: int, epoch: int, micro_batch: int | None
) -> tuple[Tensor, Tensor]:
    """Train on every image once, or as `config.imbalance` draws them.

    Returns logits (N, K), float32, of the images as they were augmented while training, and their labels (N,), in the
    order of training and on the device; the same in every process. Raises TrainingDiverged when a loss is not finite.
    """
    from medtune.data.sampling import epoch_order
    from medtune.data.transforms import draw

    device, (height, width) = train.images.device, train.images.shape[-2:]
    group = stepper.group
    order = epoch_order(train.labels, config.imbalance, generator(config.seed, epoch, "order")).to(device)
    draws = generator(config.seed, epoch, "augmentation")
    partners = generator(config.seed, epoch, f"partners{group.rank}") if config.patch_momentum else None
    labels = train.labels[order]
    count = len(labels)
    bounds = batch_bounds(count, config.batch_size, least=2 * group.world)
    losses = torch.zeros(len(bounds), device=device)
    logits = torch.zeros((count, classes), device=device)
    stepper.net.train()
    for number, (start, stop) in enumerate(bounds):
        # Drawn for the whole batch, whoever computes it: pieces and processes change nothing.
        changes = draw(stop - start, height, width, draws, config.augmentation).to(device)
        marks = pieces(start, stop, micro_batch, group)
        (first, _), (_, last) = marks[0], marks[-1]
        batch = Batch(
            train.images[order[first:last]],
            labels[first:last],
            changes.part(first - start, last - start),
            None if partners is None else _partners(marks, partners).to(device),
        )
        # They lie in tensors that the next step writes to: copied at once.
        logits[first:last], losses[number] = stepper.step(batch, [(a - first, b - first) for a, b in marks], stop - start)
        # On a GPU at the end alone, as a look would wait for it.
        if number + 1 == len(bounds) or (device.type == "cpu" and (number + 1) % CHECK_EVERY == 0):
            _require_finite(losses[: number + 1], epoch, bounds, group)
    group.add_up(logits)
    if not torch.isfinite(logits).all():
        raise TrainingDiverged(f"the model's output is not finite at epoch {epoch}. A lower learning rate may help")
    return logits, labels


def _partners(marks: list[tuple[int, int]], draws: torch.Generator) -> Tensor:
    """Each image's partner, among those that are computed with it."""
    return torch.cat([torch.randperm(last - first, generator=draws) for first, last in marks])


def _require_finite(losses: Tensor, epoch: int, bounds: list[tuple[int, int]], group: Group) -> None:
    """All processes see the same losses, and so end together."""
    total = losses.clone()
    group.add_up(total)
    for batch, value in enumerate(total.tolist()):
        if not math.isfinite(value):
            start, stop = bounds[batch]
            raise TrainingDiverged(
                f"train loss is {value} at epoch {epoch}, batch {batch + 1} of {len(bounds)} "
                f"(images {start + 1} to {stop} of the epoch). A lower learning rate may help"
            )


def optimizer_of(model: nn.Module, config: TrialConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `config` asks for; parameters in the model's `no_weight_decay()` take none."""
    free: set[str] = getattr(model, "no_weight_decay", set)()
    # Small ones beside each other: a fused step takes some dozens of tensors a launch, which is over when its largest is.
    named = dict(sorted(model.named_parameters(), key=lambda entry: entry[1].numel()))
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
    return kind(groups, lr=config.lr, fused=fused, capturable=device.type == "cuda")  # capturable: by CUDA graphs
