"""What images are compared by: their pixels, a perceptual hash, and their grey levels or colours at 28 px, normalised.

MedMNIST cut the central square out of each image before it made it small; other collections squeeze the whole image into
a square. An image that came both ways is found by looking at central crops of the one that is not cut (`CROPS`).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.fft import dctn
from torch import Tensor

Floats = NDArray[np.float32]
Crop = tuple[float, float]
"""Shares of height and width that are kept, about the centre."""

SIDE = 28
"""Side in px at which images are correlated; that of MedMNIST's smallest files."""
HASHED = 32
"""Side in px that pHash works at."""
ENOUGH = 5 * SIDE
"""Side in px at which half an image is still more than twice as large as it is looked at."""
WHOLE: tuple[Crop, ...] = ((1.0, 1.0),)
CROPS: tuple[Crop, ...] = (
    *WHOLE,
    *((1.0, share / 20) for share in range(10, 20)),
    *((share / 20, 1.0) for share in range(10, 20)),
)
"""The whole image, and strips cut off two opposite sides until half is left, in steps of a twentieth."""


def looked_at(images: NDArray[np.uint8], crop: Crop, side: int, grey: bool) -> Tensor:
    """Images uint8 (N, C, H, W) cropped and resized, float32 (N, C or 1, side, side), in grey levels 0 to 255."""
    _, _, height, width = images.shape
    rows, columns = round(crop[0] * height), round(crop[1] * width)
    top, left = (height - rows) // 2, (width - columns) // 2
    found = torch.from_numpy(np.ascontiguousarray(images[:, :, top : top + rows, left : left + columns])).float()
    if grey and found.shape[1] == 3:
        found = (found * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
    if (rows, columns) != (side, side):
        found = F.interpolate(found, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return found.clamp_(0, 255)


def shrunk(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images whose side is at most `ENOUGH`: crops of large ones are then quick to take."""
    if images.shape[-1] <= ENOUGH:
        return images
    return looked_at(images, WHOLE[0], ENOUGH, grey=False).round().byte().numpy()


def vectors(images: NDArray[np.uint8], crop: Crop, grey: bool) -> Floats:
    """(N, D), whose products are correlations at `SIDE`: each channel of mean 0, each image of length 1 (flat ones: 0)."""
    found = looked_at(images, crop, SIDE, grey).flatten(2)
    found -= found.mean(dim=2, keepdim=True)
    return F.normalize(found.flatten(1), eps=1e-3).numpy()


def hashes(images: NDArray[np.uint8], crop: Crop) -> Floats:
    """(N, 64) of 1 and -1: pHash, as imagehash has it, of many images at once.

    Two hashes' product is 64 less twice the number of bits that differ.
    """
    found = looked_at(images, crop, HASHED, grey=True).round().numpy()[:, 0]
    low = dctn(found, axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    return np.where(low > np.median(low, axis=1, keepdims=True), np.float32(1), np.float32(-1))


def digests(images: NDArray[np.uint8], side: int, grey: bool) -> list[bytes]:
    """One an image: equal ones are equal pixels at `side`."""
    if images.shape[-2:] != (side, side) or (grey and images.shape[1] == 3):
        images = looked_at(images, WHOLE[0], side, grey).round().byte().numpy()
    return [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]
