"""What augmentation costs a batch: milliseconds and peak device memory, by the images' side and strength.

Run:  python benchmarks/augment.py [--batch 64] [--size 224]
"""

from __future__ import annotations

import time

import torch
import tyro

from medtune.data.transforms import augment, draw
from medtune.evaluate import default_device


def main(batch: int = 64, size: int = 224, repeats: int = 20) -> None:
    """Print a line for each native side and strength."""
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"batch {batch}, {size} px: {name}")
    for side, channels in ((28, 1), (64, 1), (224, 1), (224, 3)):
        images = torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8).to(device)
        for strength in (0.0, 1.0):
            chance = torch.Generator().manual_seed(0)
            augment(images, size, draw(batch, side, side, chance, strength))
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            for _ in range(repeats):
                augment(images, size, draw(batch, side, side, chance, strength))
            if device.type == "cuda":
                torch.cuda.synchronize()
            each = (time.perf_counter() - started) / repeats
            memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if device.type == "cuda" else ""
            print(f"  {channels} x {side} px, strength {strength:.0f}: {1000 * each:.2f} ms{memory}")


if __name__ == "__main__":
    tyro.cli(main)
