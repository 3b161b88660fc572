"""Where one looks into the architectures: the blocks they are made of, and what these give as maps."""

from __future__ import annotations

import importlib
import math

from torch import Tensor, nn

from medtune.models import module_of

CHANNELS_LAST = ("medtune.models.medmamba", "medtune.models.vmamba")
"""Their blocks give (B, H, W, C); the others' (B, C, H, W), or tokens (B, L, C) with the class token in their middle."""


def blocks_of(name: str, model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that was built by this name, in the order in which images go through them."""
    kinds = importlib.import_module(module_of(name)).BLOCKS
    return [module for module in model.modules() if isinstance(module, kinds)]


def to_maps(name: str, output: Tensor) -> Tensor:
    """What a block gives as (B, C, H, W); of tokens of square images those of the patches."""
    if output.dim() == 4:
        return output.permute(0, 3, 1, 2) if module_of(name) in CHANNELS_LAST else output
    patches = output.shape[1] - 1
    keep = [i for i in range(patches + 1) if i != patches // 2]
    return output[:, keep].transpose(1, 2).unflatten(2, (math.isqrt(patches), -1))
