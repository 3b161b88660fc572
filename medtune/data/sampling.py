"""What is done about classes of unequal size: which images an epoch sees, and how much each counts in the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def epoch_order(labels: Tensor, imbalance: str, generator: torch.Generator) -> Tensor:
    """Positions int64 (N,) of an epoch's images, on the CPU; `labels` int64 (N,), `generator` on the CPU.

    "none" and "weighted": every image once. "balanced": N images, as many of each class that is there (to one, by
    lot), the classes in random order. A class's images come in passes, each in a new order: none comes again before
    all of its class have come. A large class is not seen in full, then; the epochs differ in what they leave out.
    """
    count = len(labels)
    if imbalance != "balanced" or count == 0:
        return torch.randperm(count, generator=generator)
    labels = labels.cpu()
    present = labels.unique()
    present = present[torch.randperm(len(present), generator=generator)]
    turns = present.repeat(math.ceil(count / len(present)))[:count]
    turns = turns[torch.randperm(count, generator=generator)]
    order = torch.empty(count, dtype=torch.int64)
    for label in present.tolist():
        members = (labels == label).nonzero()[:, 0]
        places = (turns == label).nonzero()[:, 0]
        passes = math.ceil(len(places) / len(members))
        shuffled = [members[torch.randperm(len(members), generator=generator)] for _ in range(passes)]
        order[places] = torch.cat(shuffled)[: len(places)] if passes else members[:0]
    return order


def class_weights(labels: Tensor, classes: int, imbalance: str) -> Tensor | None:
    """For "weighted", a weight float32 (K,) per class on the labels' device, by which each image's loss is multiplied.

    In inverse proportion to the class's images, 1 in the mean over the images of `labels` (N,): N / (K n), of the K
    classes that are there; 0 for one that is not. None for the other choices.
    """
    if imbalance != "weighted":
        return None
    counts = (labels[:, None] == torch.arange(classes, device=labels.device)).sum(dim=0)  # bincount waits for the device
    present = counts > 0
    weights = len(labels) / (present.sum() * counts.clamp(min=1))
    return torch.where(present, weights, 0.0).float()
