"""How a model's weights and maps lie in memory on a device."""

from __future__ import annotations

import torch
from torch import nn

from medtune.models.parts import parts_of


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, the same object. Shapes, names and values stay.

    Off the CPU, the weights of models with parts that CHANNELS_LAST names lie as (K, H, W, C), and every map follows them:
    cuDNN's bfloat16 kernels want it, and convert to it and back what lies otherwise. ResNet-50 trains 1.7 times as fast so
    on an H200, MedViT 1.8 times (benchmarks/NOTES.md). Parts that FILTERS_LAST names keep their maps (B, H, W, C) anyway,
    and have their weights laid out so too.
    """
    model = model.to(device)
    if device.type == "cpu":
        return model
    if parts_of(model, "CHANNELS_LAST"):
        return model.to(memory_format=torch.channels_last)
    for part in parts_of(model, "FILTERS_LAST"):
        part.to(memory_format=torch.channels_last)
    return model
