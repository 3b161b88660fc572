"""What a model costs, counted on the meta device: no weight is made and no image computed."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from medtune.models import build, module_of

NOT_COUNTED = "convolutions and matrix products alone: without norms, activations and the selective scan's recurrence"


class Cost(NamedTuple):
    """Parameters, and multiply-adds of one image."""

    parameters: int
    multiply_adds: int


def cost(name: str, image_size: int = 224, num_classes: int = 2) -> Cost:
    """Count a model of `build` for square images of `image_size` px. Raises ConfigError as `build` does."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build(name, num_classes=num_classes).eval()
        model(torch.empty(1, 3, image_size, image_size))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def source(name: str) -> str:
    """The paper a model is from: the head of its file's docstring."""
    head = importlib.import_module(module_of(name)).__doc__ or ""
    return head.partition(")")[0] + ")"
