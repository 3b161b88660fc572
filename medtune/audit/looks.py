"""What images are compared by: their pixels, a perceptual hash, and their grey levels or colours at 28 px, normalised.

MedMNIST cut the central square out of each image before it made it small; other collections squeeze the whole image into
a square. An image that came both ways is found by looking at central crops of the one that is not cut (`CROPS`).
"""

from __future__ import annotations

import hashlib

import imagehash
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Floats = NDArray[np.float32]
Crop = tuple[float, float]
"""Shares of height and width that are kept, about the centre."""

SIDE = 28
"""Side in px at which images are correlated; that of MedMNIST's smallest files."""
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


def vectors(images: NDArray[np.uint8], crop: Crop, grey: bool) -> Floats:
    """(N, D), whose products are correlations at `SIDE`: each channel of mean 0, each image of length 1 (flat ones: 0)."""
    found = looked_at(images, crop, SIDE, grey).flatten(2)
    found -= found.mean(dim=2, keepdim=True)
    return F.normalize(found.flatten(1), eps=1e-3).numpy()


def hashes(images: NDArray[np.uint8], crop: Crop) -> Floats:
    """(N, 64) of 1 and -1: imagehash's pHash. Two hashes' product is 64 less twice the number of bits that differ."""
    found = looked_at(images, crop, images.shape[-1], grey=True).round().byte().numpy()
    return np.stack([imagehash.phash(Image.fromarray(image[0])).hash.ravel() for image in found]) * np.float32(2) - 1


def digests(images: NDArray[np.uint8], side: int, grey: bool) -> list[bytes]:
    """One an image: equal ones are equal pixels at `side`."""
    if images.shape[-2:] != (side, side) or (grey and images.shape[1] == 3):
        images = looked_at(images, WHOLE[0], side, grey).round().byte().numpy()
    return [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]
