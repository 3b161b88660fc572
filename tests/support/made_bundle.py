"""Bundles put down by hand: a small model with drawn weights, whose answers differ from image to image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from medtune import models
from medtune.deploy.bundle import LIKENESS, WEIGHTS, seal
from medtune.deploy.likeness import Reference, features_of, joined

SIDE = 32


def make_bundle(folder: Path, *, model: str = "vim_tiny", seed: int = 0) -> Path:
    """A bundle for two classes, images of 32 px."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    net = models.build(model, num_classes=2, in_channels=3).eval()
    with torch.no_grad():
        net.get_parameter("head.weight").mul_(40)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / WEIGHTS)
    with torch.no_grad(), features_of(model, net) as found:
        net(torch.rand(16, 3, SIDE, SIDE))
    save_file(dict(Reference.of(joined(found)).tensors()), folder / LIKENESS)
    about = {
        "model": model,
        "classes": ["normal", "pneumonia"],
        "precision": "fp32",
        "code": {"version": "0"},
        "preprocessing": {"image_size": SIDE, "channels": 1, "height": SIDE, "width": SIDE, "native_size": SIDE},
        "decision": {"threshold": 0.4, "temperature": 1.5},
        "likeness": {"limit": 0.5},
    }
    seal(folder, about)
    return folder


def picture(seed: int, side: int = 64, colour: bool = False) -> NDArray[np.uint8]:
    """A generated image, uint8 (H, W) or (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3) if colour else (4, 4), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """As a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
