"""One trial's speed and memory on this machine's device: images a second, peak memory, seconds of each part.

Run:  python benchmarks/trial.py [--model medmamba_s] [--epochs 2] [--image-size 224] [--batch-size 64] ...

Trains with the library's own loop on the pair given (default: real PneumoniaMNIST) and tests it as a trial's end does.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import tyro

from medtune.config import TrialConfig
from medtune.data import limit, load_pair
from medtune.evaluate import default_device, external_test, resolve_precision
from medtune.training import fit


def main(
    trial: Annotated[TrialConfig, tyro.conf.arg(name="")],
    data_dir: Path | None = None,
    external_dir: Path | None = None,
) -> None:
    """Train a few epochs and print the figures."""
    device = default_device()
    data = load_pair(trial.pair, native_size=trial.native_size, data_dir=data_dir, external_dir=external_dir)
    data = limit(data, train_limit=trial.train_limit, external_limit=trial.external_limit)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = resolve_precision(trial.precision, device)
    print(f"{trial.model}, {trial.image_size} px, batch {trial.batch_size}, {precision}: {name}")
    run = fit(trial, data, device=device)
    for result in run:
        figures = " ".join(f"{k} {v:.4f}" for k, v in result.metrics.items() if v is not None and k.startswith("val/"))
        speed = f"{result.images_per_second:.1f} images/s, {result.seconds:.1f} s with val"
        print(f"epoch {result.epoch}: {speed}; {figures}", flush=True)
    if device.type == "cuda":
        print(f"peak device memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    started = time.perf_counter()
    tested = external_test(run.best_model(), trial, data, device)
    print(f"external test, twice {len(data.external)} images: {time.perf_counter() - started:.1f} s")
    print({key: tested[key] for key in ("external/name", "external/auc", "external_matched/auc")})


if __name__ == "__main__":
    tyro.cli(main)
