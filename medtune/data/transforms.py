"""Image transforms on whole batches, on the device that holds the images.

`augment` and `prepare` take uint8 images and give what models take. Their interpolation is torchvision's bilinear
with antialiasing on float tensors, to rounding errors. PIL, and torchvision on uint8 tensors, round to whole grey
levels after resizing: their pixels differ by up to half a level (0.004 after normalisation), or one level where both
passes round.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
EXPOSURE = 0.4
"""At strength 1, contrast and brightness are multiplied by 1 - 0.4 to 1 + 0.4."""
SHARPNESS = (2 / 224, 1.0)
"""At strength 1, blur has a sigma of up to this share of the stored side, or so many stored pixels if that is more."""
RESOLUTION = 4.0
"""At strength 1, resolution is divided by up to 4."""
_TRIES = 10
_CHUNK_PIXELS = 1 << 24


@dataclass(frozen=True)
class Draws:
    """What chance decides for the images of a batch, on the generator's device until moved."""

    boxes: Tensor
    """int32 (B, 4): top, left, height, width of the crop."""
    flips: Tensor
    """bool (B,): mirrored."""
    looks: Tensor | None = None
    """float32 (B, 4): factors of contrast and of brightness, sigma of the blur in stored pixels, share of the
    resolution that is kept; None at strength 0."""

    def part(self, start: int, stop: int) -> Draws:
        """The draws of images start to stop: what they become does not depend on the rest of the batch."""
        return self._each(lambda drawn: drawn[start:stop])

    def copy(self) -> Draws:
        """The same in tensors of their own."""
        return self._each(torch.clone)

    def to(self, device: torch.device) -> Draws:
        """The draws on `device`, which is not waited for."""

        def move(drawn: Tensor) -> Tensor:
            if device.type == "cuda" and not drawn.is_cuda:
                drawn = drawn.pin_memory()
            return drawn.to(device, non_blocking=True)

        return self._each(move)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Draws:
        return Draws(change(self.boxes), change(self.flips), None if self.looks is None else change(self.looks))


def draw(count: int, height: int, width: int, generator: torch.Generator, strength: float = 0.0) -> Draws:
    """Draws for `count` images of height x width, from `generator` alone: on the CPU, nothing waits for the device.

    strength: 0 for crops and mirrors alone; up to 1 for exposure, blur and resolution as well. Crops and mirrors are
    the same at every strength. Each image has its own amounts: factors of contrast and brightness, uniform about 1;
    sigma, uniform from 0; resolution, uniform in its logarithm from all of it down.
    """
    boxes = sample_boxes(count, height, width, generator)
    flips = torch.rand(count, generator=generator, device=generator.device) < 0.5
    if strength == 0:
        return Draws(boxes, flips)
    amounts = torch.rand(count, 4, generator=generator, device=generator.device)
    exposure = 1 + strength * EXPOSURE * (2 * amounts[:, :2] - 1)
    sigma = strength * max(SHARPNESS[0] * max(height, width), SHARPNESS[1]) * amounts[:, 2:3]
    kept = RESOLUTION ** (-strength * amounts[:, 3:])
    return Draws(boxes, flips, torch.cat([exposure, sigma, kept], dim=1))


def augment(images: Tensor, size: int, draws: Draws, compiles: bool = False) -> Tensor:
    """RandomResizedCrop(size), RandomHorizontalFlip, Normalize(0.5, 0.5), and what `draws.looks` asks for.

    images: uint8 (B, C, H, W) with C 1 or 3, as many as draws. Returns float32 (B, 3, size, size) in [-1, 1], to
    rounding errors, on the images' device; channels may be one in memory. compiles: by torch.compile, which makes a few
    kernels of fifty tiny ones.

    Exposure, blur and resolution come before the crop, as they do in a hospital: they are the whole image's, whichever
    part of it is cut out. After it they would do nothing to small images: 28 px enlarged to 224 hold no detail that a
    blur of 2 px or a resolution of 56 px could take away.
    """
    _require_images(images)
    draws = draws.to(images.device)
    change = _compiled_change() if compiles else _changed
    return change(images, size, draws.boxes, draws.flips, draws.looks).expand(-1, 3, -1, -1)


def _changed(images: Tensor, size: int, boxes: Tensor, flips: Tensor, looks: Tensor | None) -> Tensor:
    levels = _normalised(images)
    if looks is None:
        return resized_crop(levels, boxes, flips, size)
    contrast, brightness, sigma, kept = looks.unbind(1)
    return resized_crop(_exposed(levels, contrast, brightness), boxes, flips, size, sigma, kept)


@functools.cache
def _compiled_change() -> Callable[..., Tensor]:
    return torch.compile(_changed, dynamic=False)


def _exposed(levels: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Contrast about each image's own mean, then brightness from black; cut off at black and white."""
    mean = levels.mean(dim=(1, 2, 3), keepdim=True)
    factor = (contrast * brightness)[:, None, None, None]
    # ((x - mean) * contrast + mean + 1) * brightness - 1
    return ((levels - mean) * factor + (mean + 1) * brightness[:, None, None, None] - 1).clamp(-1, 1)


def sample_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Crop boxes (count, 4) as whole numbers top, left, height, width, on the generator's device.

    The distribution of torchvision's RandomResizedCrop with its default scale and ratio: up to ten draws until a box
    fits, else the largest centred box with an allowed ratio.
    """
    draws = torch.rand(count, 2 * _TRIES + 2, generator=generator, device=generator.device, dtype=torch.float64)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * draws[:, :_TRIES])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + (high - low) * draws[:, _TRIES : 2 * _TRIES])
    widths, heights = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    w, h = widths.gather(1, first)[:, 0], heights.gather(1, first)[:, 0]
    top = torch.floor(draws[:, -2] * (height - h + 1))
    left = torch.floor(draws[:, -1] * (width - w + 1))
    boxes = torch.stack([top, left, h, w], dim=1)
    fallback = torch.tensor(_centred_box(height, width), dtype=boxes.dtype, device=boxes.device)
    return torch.where(fits.any(dim=1, keepdim=True), boxes, fallback).to(torch.int32)


def _centred_box(height: int, width: int) -> tuple[int, int, int, int]:
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(
    images: Tensor,
    boxes: Tensor,
    flips: Tensor,
    size: int,
    sigma: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Cut `boxes` (B, 4: top, left, height, width) out of images (B, C, H, W), resize, mirror where `flips` (B,).

    sigma, kept (B,), given together: before it, blur the images by so many pixels and take them down to this share of
    their resolution and back. All are one product with a matrix per image and axis.
    Returns float32 (B, C, size, size) in the images' own units.
    """
    top, left, height, width = boxes.to(torch.float32).unbind(1)
    with torch.autocast(images.device.type, enabled=False):
        rows = _interpolation(top, height, images.shape[-2], size)  # (B, size, H)
        columns = _interpolation(left, width, images.shape[-1], size, flips)  # (B, size, W)
        if sigma is not None and kept is not None:
            rows, columns = _softened(rows, sigma, kept), _softened(columns, sigma, kept)
        return rows[:, None] @ images.to(torch.float32) @ columns[:, None].transpose(-1, -2)


def _softened(weights: Tensor, sigma: Tensor, kept: Tensor) -> Tensor:
    """Weights (B, size, side) that read an axis, made to read it after blur and at a lower resolution."""
    side = weights.shape[-1]
    at = torch.arange(side, device=weights.device, dtype=torch.float32) + 0.5
    between = at[:, None] - at
    gauss = torch.exp(-0.5 * (between / sigma.clamp(min=0.05)[:, None, None]) ** 2)
    # A triangle as wide as a coarse pixel, for averaging into them and, read the other way, for going between them.
    coarse = (side * kept).round().clamp(min=1)  # (B,) positions
    shares = (1 - (at[:, None] * (coarse / side)[:, None, None] - at).abs()).clamp(min=0)  # (B, side, coarse...)
    shares = shares * (at < coarse[:, None])[:, None]
    return weights @ _normed(shares) @ _normed(shares.transpose(1, 2)) @ _normed(gauss)


def _normed(weights: Tensor) -> Tensor:
    """Rows that sum to 1; those of zeros stay."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)


def _interpolation(start: Tensor, length: Tensor, side: int, size: int, flips: Tensor | None = None) -> Tensor:
    """Weights (B, size, side) that resize the stretch [start, start + length) of an axis to `size` positions.

    A triangle as wide as an output pixel, one input pixel at least, cut at the stretch's ends and normed to sum 1.
    """
    at = torch.arange(size, device=start.device, dtype=torch.float32)[None]  # (1, size)
    if flips is not None:
        at = torch.where(flips[:, None], size - 1 - at, at)
    scale = (length / size)[:, None]
    centre = (scale * (at + 0.5))[..., None]
    inside = torch.arange(side, device=start.device, dtype=torch.float32) - start[:, None]  # (B, side)
    weights = 1 - (inside[:, None] + 0.5 - centre).abs() / scale.clamp(min=1)[..., None]
    within = (inside >= 0) & (inside < length[:, None])
    weights = weights.clamp(min=0) * within[:, None]
    return weights / weights.sum(-1, keepdim=True)


def prepare(images: Tensor, size: int) -> Tensor:
    """Resize to (size, size) and Normalize(0.5, 0.5), for evaluation.

    images: uint8 (B, C, H, W) with C 1 or 3. Returns float32 (B, 3, size, size) in [-1, 1] on the images' device.
    """
    _require_images(images)
    return _three_channels(_resize(_normalised(images), size))


def match_resolution(images: Tensor, native_size: int) -> Tensor:
    """Bring images down to (native_size, native_size), antialiased; images that are no larger stay as they are.

    images: uint8 (B, C, H, W). Returns uint8 (B, C, native_size, native_size): what a file of that size would hold.
    """
    _require_images(images)
    if max(images.shape[-2:]) <= native_size:
        return images
    chunk = max(1, _CHUNK_PIXELS // math.prod(images.shape[1:]))
    parts = (_resize(part.to(torch.float32), native_size) for part in images.split(chunk))
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def _resize(levels: Tensor, size: int) -> Tensor:
    if levels.shape[-2:] == (size, size):
        return levels
    return F.interpolate(levels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def _normalised(images: Tensor) -> Tensor:
    """Grey levels 0 to 255 as -1 to 1. Weights of an interpolation sum to 1, so before it is as good as after it."""
    return images.to(torch.float32).mul_(2 / 255).sub_(1)


def _three_channels(images: Tensor) -> Tensor:
    return images if images.shape[1] == 3 else images.repeat(1, 3, 1, 1)


def _require_images(images: Tensor) -> None:
    good = images.ndim == 4 and images.dtype == torch.uint8 and images.shape[1] in (1, 3)
    if not good:
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 (B, C, H, W) with 1 or 3 channels, got {found}")
