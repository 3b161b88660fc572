"""Seconds an image takes through a bundle's predictor on a CPU: decoding, prediction, likeness; alone and in a batch.

    python benchmarks/predict.py                                    # medmamba_s at 224 px, fresh weights
    python benchmarks/predict.py --model resnet50 --size 224 --threads 2

The weights are fresh: their values change nothing of how long it takes. The image is a PNG of 256 x 256 px, as CPN X-ray's.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from medtune import models
from medtune.deploy.bundle import Bundle
from medtune.deploy.images import read_image
from medtune.deploy.likeness import Reference
from medtune.deploy.predictor import Predictor, outputs


def main(model: str = "medmamba_s", size: int = 224, threads: int = 1, repeats: int = 5, batch: int = 16) -> None:
    """Print the median of `repeats`, after one that warms up.

    Args:
        model: Architecture.
        size: Side in px of the images that the model takes.
        threads: Threads that torch computes with.
        repeats: Measurements.
        batch: Images of the batch.
    """
    torch.set_num_threads(threads)
    predictor = _fresh(model, size)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)).save(file, "PNG")
    for count in (1, batch):
        seconds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            predictor.predict([read_image(file.getvalue()) for _ in range(count)])
            seconds.append((time.perf_counter() - began) / count)
        print(f"{model}, {size} px, {threads} threads, {count} at a time: {np.median(seconds[1:]):.3f} s an image")
    began = time.perf_counter()
    predictor.heat_map(read_image(file.getvalue()))
    print(f"heat map: {time.perf_counter() - began:.3f} s")


def _fresh(model: str, size: int) -> Predictor:
    device = torch.device("cpu")
    network = models.build(model).eval().requires_grad_(False)
    images = torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8)
    manifest = {
        "model": model,
        "classes": ["normal", "pneumonia"],
        "precision": "fp32",
        "preprocessing": {"channels": 1, "height": 256, "width": 256, "native_size": 28, "image_size": size},
        "decision": {"threshold": 0.5, "temperature": 1.0},
        "likeness": {"limit": 1.0},
    }
    reference = Reference.of(outputs(model, network, images, size, device, "fp32")[1])
    return Predictor(Bundle(Path(), manifest, {}), network, reference, device)


if __name__ == "__main__":
    tyro.cli(main)
