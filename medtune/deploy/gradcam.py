"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): what in an image speaks for the positive class.

Our own few lines: the library `grad-cam` computes the same (a test compares them), but needs OpenCV, which does not import
where there is no libGL, and stretches each map to the full range, which makes noise look like a finding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from medtune.data.transforms import prepare
from medtune.deploy.layers import blocks_of, to_maps

LEAST_SIDE = 4
"""Maps with fewer positions a side show nothing of where."""
OPACITY = 0.5
COLOURS = colormaps["inferno"]


def heat_map(name: str, model: nn.Module, image: Tensor, size: int, label: int | None = None) -> NDArray[np.float32]:
    """Heat (size, size) in [0, 1] of a prepared uint8 image (C, H, W): 1 where most speaks for the class, 0 elsewhere.

    label: the class; default: of two classes the positive one, of more the most probable. The map is of the last block whose
    maps have `LEAST_SIDE` positions a side, or the finest there are; of Vim of the last but one, after which only the
    class token is read.
    """
    device = next(model.parameters()).device
    outputs: list[Tensor] = []
    blocks = blocks_of(name, model)
    hooks = [block.register_forward_hook(lambda _, inputs, output: outputs.append(output)) for block in blocks]
    try:
        with torch.enable_grad():
            logits = model(prepare(image[None].to(device), size).requires_grad_())[0]
            chosen = _chosen(name, outputs)
            target = _score(logits, label)
            (gradient,) = torch.autograd.grad(target, chosen)
    finally:
        for hook in hooks:
            hook.remove()
    weights, maps = to_maps(name, gradient).mean((2, 3), keepdim=True), to_maps(name, chosen)
    heat = F.relu((weights * maps).sum(1, keepdim=True).detach().float())
    heat = F.interpolate(heat, size=(size, size), mode="bilinear", align_corners=False)[0, 0]
    return (heat / heat.max().clamp(min=1e-12)).cpu().numpy()


def _score(logits: Tensor, label: int | None) -> Tensor:
    """What is explained. Of two classes the difference of both logits: it alone decides."""
    if len(logits) == 2:
        positive = 1 if label is None else label
        return logits[positive] - logits[1 - positive]
    return logits[logits.argmax() if label is None else label]


def _chosen(name: str, outputs: Sequence[Tensor]) -> Tensor:
    read = outputs[:-1] if outputs[-1].dim() == 3 else outputs
    sides = [min(to_maps(name, output).shape[2:]) for output in read]
    fine = [output for output, side in zip(read, sides, strict=True) if side >= min(LEAST_SIDE, max(sides))]
    return fine[-1]


def overlay(name: str, model: nn.Module, image: Tensor, size: int, label: int | None = None) -> Image.Image:
    """A prepared uint8 image (C, H, W) in its own size with its heat map over it."""
    height, width = image.shape[1:]
    heat = Image.fromarray(heat_map(name, model, image, size, label)).resize((width, height), Image.Resampling.BILINEAR)
    levels = np.asarray(heat)[..., None] * OPACITY
    below = np.broadcast_to(image.cpu().permute(1, 2, 0).numpy(), (height, width, 3))
    colours = COLOURS(np.asarray(heat))[..., :3] * 255
    return Image.fromarray((below * (1 - levels) + colours * levels).round().astype(np.uint8))
