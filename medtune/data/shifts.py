"""Simulated shifts: val images as another device might have made them, for judging weights without another hospital.

A fixed list of fixed strengths, nothing drawn anew: the same images are the same shifted images in every trial, on every
device and in batches of any size. They act on the stored uint8 images, before these are brought to the model's size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as images_of

from medtune.data.transforms import EXPOSURE, SHARPNESS, match_resolution

NOISE = 0.05
"""Standard deviation of the noise as a share of the grey range."""
COARSER = 2
"""What the resolution is divided by."""
_PATTERNS = 64
"""Noise patterns; image i has pattern i modulo this, so that a batch needs nothing but where it begins."""

Shift = Callable[[Tensor, int], Tensor]
"""Images uint8 (B, C, H, W), the first one's index in its split -> images uint8, shifted."""


def _contrast(factor: float) -> Shift:
    return lambda images, start: images_of.adjust_contrast(images, factor)


def _brightness(factor: float) -> Shift:
    return lambda images, start: images_of.adjust_brightness(images, factor)


def _blurred(images: Tensor, start: int) -> Tensor:
    """By as much as augmentation does at most: a sigma of one stored pixel at 28 px, of two at 224."""
    sigma = max(SHARPNESS[0] * max(images.shape[-2:]), SHARPNESS[1])
    return images_of.gaussian_blur(images, kernel_size=[2 * round(3 * sigma) + 1] * 2, sigma=[sigma])


def _noisy(images: Tensor, start: int) -> Tensor:
    patterns = _patterns(tuple(images.shape[1:]), images.device)
    chosen = torch.arange(start, start + len(images), device=images.device) % _PATTERNS
    return (images.to(torch.float32) + patterns[chosen]).round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=2)
def _patterns(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(_PATTERNS, C, H, W), drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return (255 * NOISE * torch.randn((_PATTERNS, *shape), generator=generator)).to(device)


def _coarse(images: Tensor, start: int) -> Tensor:
    return match_resolution(images, max(images.shape[-2:]) // COARSER)


SHIFTS: dict[str, Shift] = {
    "less contrast": _contrast(1 - EXPOSURE),
    "more contrast": _contrast(1 + EXPOSURE),
    "darker": _brightness(1 - EXPOSURE),
    "brighter": _brightness(1 + EXPOSURE),
    "blur": _blurred,
    "noise": _noisy,
    "half the resolution": _coarse,
}
"""By name. `val_shift/*` is the mean of a figure over all of them."""
