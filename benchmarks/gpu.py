"""How fast trials train and test on this GPU, beside the report's recipe written plainly and beside the card's own limits.

Run:  python -m benchmarks.gpu                          every model: 224 px, batch 64, PneumoniaMNIST's number of images
      python -m benchmarks.gpu --models medmamba_s --variants plain ours --profile
      python -m benchmarks.gpu --models medmamba_s --size 32 --batch 16 --images 64 --seconds 1      (a CPU can do this much)

Variants: plain    `benchmarks/plain.py`: float32, DataLoader workers with PIL transforms, copies for the scan's directions;
                   mamba-ssm's kernel where it is installed, else our scan in PyTorch
          eager    the library's own trial without CUDA graphs
          graphs   with them, and nothing compiled
          ours     with compiled blocks as well, as long trials of a sweep are run
Images are made up: a step's time does not depend on what they show. `data`, `forward`, ... are milliseconds a step; ours are
those of CUDA graphs of the first parts of a step, each less the one before, on one stream, where a step may have two
(`medtune/ops/beside.py`). Predictions and results: benchmarks/NOTES.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks import plain
from medtune.config import TrialConfig
from medtune.data.pair import PairData, Split
from medtune.data.transforms import augment, draw
from medtune.evaluate import autocast, default_device, predict, resolve_precision
from medtune.models import available
from medtune.models.compiled import compiled
from medtune.ops.engines import VARIABLE
from medtune.seeding import generator
from medtune.steps import COMPILE, SWITCH
from medtune.training import Fit, fit

Variant = Literal["plain", "eager", "graphs", "ours"]
COLUMNS = ("images/s", "eval/s", "GiB", "data", "forward", "backward", "optimizer", "first epoch s")
VAL = 524
"""Validation images of PneumoniaMNIST."""


def main(
    models: tuple[str, ...] = (),
    variants: tuple[Variant, ...] = ("plain", "eager", "graphs", "ours"),
    size: int = 224,
    batch: int = 64,
    images: int = 4708,
    seconds: float = 4.0,
    epochs: int = 3,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    activation_checkpointing: bool = False,
    profile: bool = False,
    out: Path | None = None,
) -> None:
    """Measure and print one table.

    Args:
        models: names of models; none: all.
        variants: what to run of each.
        size: side of the images in px, as the model sees them.
        batch: images a step.
        images: training images.
        seconds: how long the plain recipe is measured.
        epochs: epochs of ours; the last one counts, the first one's seconds are told as well.
        precision: of ours.
        activation_checkpointing: of ours.
        profile: also tell which kernels the time goes to.
        out: file for the figures as JSON.
    """
    device = default_device()
    print(describe(device), flush=True)
    found: dict[str, Any] = {"device": describe(device), "ceilings": ceilings(device)}
    print("  ".join(f"{name} {value:.0f}" for name, value in found["ceilings"].items()), flush=True)
    data = made_up(images)
    print(f"{size} px, batch {batch}, {resolve_precision(precision, device)} for ours\n", flush=True)
    print(f"{'':24}" + "".join(f"{name:>14}" for name in COLUMNS), flush=True)
    for name in models or available():
        config = TrialConfig(
            model=name, image_size=size, batch_size=batch, epochs=epochs, precision=precision,
            activation_checkpointing=activation_checkpointing, resamples=0,
            schedule="constant",  # a rate that drops has a step recorded anew, of these few epochs in the one that counts
        )  # fmt: skip
        rows: dict[str, dict[str, float]] = {}
        for variant in variants:
            fresh(device)
            try:
                rows[variant] = measure(variant, config, data, device, seconds)
            except torch.OutOfMemoryError:
                print(f"{name + ' ' + variant:24}  does not fit", flush=True)
                continue
            cells = "".join(f"{rows[variant].get(column, float('nan')):14.2f}" for column in COLUMNS)
            print(f"{name + ' ' + variant:24}{cells}", flush=True)
        if "plain" in rows and "ours" in rows:
            print(f"{name:24}{rows['ours']['images/s'] / rows['plain']['images/s']:13.1f}x the plain recipe", flush=True)
        found[name] = rows
        if profile:
            tell_kernels(config, data, device)
    if out is not None:
        out.write_text(json.dumps(found, indent=1))


def mamba_is_there() -> bool:
    """Whether mamba-ssm's kernel can be had."""
    return torch.cuda.is_available() and importlib.util.find_spec("mamba_ssm") is not None


def describe(device: torch.device) -> str:
    """The card, or the CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def made_up(count: int) -> PairData:
    """Noise in the numbers and shapes of PneumoniaMNIST."""
    draws = np.random.default_rng(0)

    def split(images: int) -> Split:
        return Split(draws.integers(0, 256, (images, 1, 28, 28), dtype=np.uint8), np.arange(images) % 2)

    train, val, few = split(count), split(min(count, VAL)), split(8)
    return PairData("noise", ("a", "b"), 1, 28, train, val, few, few, external_name="noise", synthetic=True)


def fresh(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def ceilings(device: torch.device) -> dict[str, float]:
    """What the card does at best: bf16 matrix product in TFLOP/s, copies in GB/s (read and written)."""
    side, count = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.empty(count, device=device)
    target = torch.empty_like(source)
    product = milliseconds(lambda: a @ a, device)
    copy = milliseconds(lambda: target.copy_(source), device)
    return {"bf16 TFLOP/s": 2 * side**3 / product / 1e9, "copy GB/s": 8 * count / copy / 1e6}


def milliseconds(run: Callable[[], Any], device: torch.device, times: int = 20) -> float:
    """Of one call, in the mean, after three."""
    for _ in range(3):
        run()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return 1000 * (time.perf_counter() - started) / times


def measure(variant: Variant, config: TrialConfig, data: PairData, device: torch.device, seconds: float) -> dict[str, float]:
    """One row of the table."""
    if variant == "plain":
        os.environ[VARIABLE] = "mamba" if mamba_is_there() else "torch"
        trained = plain.train(config.model, data.train, config.image_size, config.batch_size, device, seconds)
        fresh(device)
        trained["eval/s"] = plain.evaluate(config.model, data.val, config.image_size, config.batch_size, device)
        return trained
    os.environ.pop(VARIABLE, None)
    os.environ[SWITCH] = "0" if variant == "eager" else "1"
    os.environ[COMPILE] = "1" if variant == "ours" else "0"
    fitting = fit(config, data, device=device)
    results = list(fitting)
    row = {"images/s": results[-1].images_per_second, "first epoch s": results[0].seconds}
    if device.type == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    if fitting.stepper is not None and fitting.stepper.problem:
        print(f"  not recorded: {fitting.stepper.problem}", flush=True)
    row["eval/s"] = 1000 * len(data.val) / milliseconds(
        lambda: predict(fitting.model, data.val, config.image_size, device, config.precision), device, times=2
    )  # fmt: skip
    if variant in ("graphs", "ours") and device.type == "cuda" and not config.activation_checkpointing:
        row |= parts_of(fitting, config, data, device, compiles=variant == "ours")
    fitting.close()
    return row


def parts_of(
    fitting: Fit, config: TrialConfig, data: PairData, device: torch.device, *, compiles: bool
) -> dict[str, float]:
    """Milliseconds of a step's parts: each is recorded as a graph together with those before it."""
    images = torch.tensor(data.train.images[: config.batch_size], device=device)
    labels = torch.tensor(data.train.labels[: config.batch_size], device=device)
    changes = draw(len(images), 28, 28, generator(0, 1, "augmentation")).to(device)
    model, optimizer = fitting.model.train(), fitting.optimizer

    def seen() -> Tensor:
        return augment(images, config.image_size, changes)

    def forward() -> Tensor:
        with compiled(model) if compiles else contextlib.nullcontext(), autocast(config.precision, device):
            return torch.nn.functional.cross_entropy(model(seen()).float(), labels)

    def backward() -> None:
        forward().backward()

    def step() -> None:
        backward()
        optimizer.step()

    taken = {}
    before = 0.0
    for name, run in {"data": seen, "forward": forward, "backward": backward, "optimizer": step}.items():
        optimizer.zero_grad(set_to_none=True)
        total = milliseconds(recorded(run, optimizer), device)
        taken[name], before = total - before, total
    return taken


def recorded(run: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """`run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay


def tell_kernels(config: TrialConfig, data: PairData, device: torch.device, most: int = 30) -> None:
    """Where a step's time goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity, profile

    fresh(device)
    os.environ[SWITCH] = "0"
    steps = 8
    few = dataclasses.replace(data, train=data.train.take(np.arange(steps * config.batch_size)))
    fitting = fit(config.replace(epochs=2), few, device=device)
    next(fitting)
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        next(fitting)
    fitting.close()
    kind = "device" if device.type == "cuda" else "cpu"  # else the calls that start kernels would count as well
    events = [(getattr(event, f"self_{kind}_time_total"), event) for event in seen.key_averages()]
    total = sum(taken for taken, _ in events)
    print(f"\n{config.model}: {total / steps / 1000:.2f} ms of kernels a step, validation's share in it")
    for taken, event in sorted(events, key=lambda entry: -entry[0])[:most]:
        print(f"  {taken / steps / 1000:8.3f} ms {event.count / steps:7.1f} times  {event.key[:110]}")
    print(flush=True)


if __name__ == "__main__":
    tyro.cli(main)
