"""The selective scan beside two plain loops: time, memory and gradients, forward and backward, at one shape.

Run:     python benchmarks/scan.py            (the naive loop takes minutes; --quick measures it on an eighth of L)
Shape:   batch 1, 384 channels in 4 groups, 16 states, L 3136: the first stage of MedMamba at 224 px, one image
Memory:  every run is a process of its own. CPU: growth of the process's largest resident set (getrusage) from after the
         inputs and a warm-up at L 64; CUDA: torch.cuda.max_memory_allocated above the inputs. Outputs and gradients count.
Truth:   the unbind loop in float64, on the same inputs.
Stages:  on a GPU, also each stage of MedMamba-s at 224 px and `--batch` images in bfloat16: the four readings' scans alone,
         and SS2D whole with its projections and convolution (under autocast), for each engine that is there. Medians of
         CUDA events around `--repeats` runs; "all" is the sum over the model's 14 blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH, CHANNELS, GROUPS, STATES, LENGTH = 1, 384, 4, 16, 3136
BARS = {"naive": 300, "unbind": 5, "MB": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the naive loop on an eighth of the length only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], help="default: all there are")
    parser.add_argument("--batch", type=int, default=64, help="images of the stages")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only-stages", action="store_true", help="on a GPU, without the plain loops")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    devices = options.devices or ["cpu", *(["cuda"] if has_cuda() else [])]
    for device in [] if options.only_stages else devices:
        compare(device, options)
    if "cuda" in devices:
        stages(options.batch, options.repeats)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def compare(device: str, options: argparse.Namespace) -> None:
    """Measure every variant on one device and say the ratios."""
    length = options.length
    short = max(64, length // 8) if options.quick else length
    there = engines() if device == "cuda" else {}
    where = f"{device}, {options.threads} threads" if device == "cpu" else device
    print(f"\n{where}: batch {BATCH}, {CHANNELS} channels, {GROUPS} groups, {STATES} states, forward + backward")
    print(f"{'variant':<12}{'L':>6}{'seconds':>12}{'MB above inputs':>18}{'largest relative error':>25}")

    def run(variant: str, at: int) -> dict[str, Any]:
        result = apart(variant=variant, length=at, device=device, threads=options.threads)
        print(f"{variant:<12}{at:>6}{result['seconds']:>12.4f}{result['mb']:>18.1f}{result['error']:>25.1e}", flush=True)
        return result

    ours, unbind = run("ours", length), run("unbind", length)
    for variant in ("triton", "mamba"):
        if variant in there:
            run(variant, length)
    ours_short = ours if short == length else run("ours", short)
    naive = run("naive", short)
    to_naive, to_unbind = naive["seconds"] / ours_short["seconds"], unbind["seconds"] / ours["seconds"]
    at = "" if short == length else f" at L {short} (--quick; its time grows with the square of L, so more at L {length})"
    print(
        f"{where}: ours is {to_naive:.0f}x faster than the naive loop{at}, {to_unbind:.1f}x faster than the unbind loop, "
        f"{ours['mb']:.0f} MB above its inputs (asked on the CPU with 2 threads at L {LENGTH}: "
        f"{BARS['naive']}x, {BARS['unbind']}x, {BARS['MB']} MB)"
    )


def apart(**case: Any) -> dict[str, Any]:
    """Measure one case in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(variant: str, length: int, device: str, threads: int) -> dict[str, Any]:
    """Best time of a few runs (one of the naive loop), memory of the first, error against float64 by another process."""
    import torch

    torch.set_num_threads(threads)
    function = variants()[variant]
    once(function, inputs(64, device))
    values = inputs(length, device)
    before = memory(device)
    results, seconds = once(function, values)
    grown = memory(device) - before
    for _ in range(0 if variant == "naive" else 4):
        seconds = min(seconds, once(function, values)[1])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.pt"
        torch.save([v.cpu() for v in results], file)
        error = truth_error(file, length)
    return {"seconds": seconds, "mb": grown, "error": error}


def truth_error(file: Path, length: int) -> float:
    import torch

    exact, _ = once(variants()["unbind"], [v.detach().double().requires_grad_() for v in inputs(length, "cpu")])
    pairs = zip(torch.load(file, weights_only=True), exact, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def memory(device: str) -> float:
    import torch

    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def inputs(length: int, device: str) -> list[Any]:
    """u, delta (before softplus), A, B, C, D, delta_bias as MedMamba starts them."""
    import torch

    g = torch.Generator().manual_seed(0)
    sequence, mixing = (BATCH, CHANNELS, length), (BATCH, GROUPS, STATES, length)
    decay = -torch.arange(1.0, STATES + 1).expand(CHANNELS, STATES).clone()
    values = [torch.randn(sequence, generator=g), 0.5 * torch.randn(sequence, generator=g), decay]
    values += [torch.randn(mixing, generator=g), torch.randn(mixing, generator=g)]
    values += [torch.ones(CHANNELS), torch.empty(CHANNELS).uniform_(-6.9, -2.3, generator=g)]
    return [v.to(device).requires_grad_() for v in values]


def once(function: Callable[..., Any], values: list[Any]) -> tuple[list[Any], float]:
    """y and the gradients, and the seconds they took."""
    import torch

    weight = torch.linspace(-1, 1, values[0].numel(), device=values[0].device).view_as(values[0]).to(values[0].dtype)
    wait = torch.cuda.synchronize if values[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    y = function(*values)
    gradients = torch.autograd.grad(y, values, weight)
    wait()
    return [y.detach(), *gradients], time.perf_counter() - start


def variants() -> dict[str, Callable[..., Any]]:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from medtune.ops import selective_scan

    def terms(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decays and inputs (batch, D, L, N), read-outs (batch, D, N, L), all in memory."""
        delta = F.softplus(delta + bias[:, None])
        B, C = (v.repeat_interleave(CHANNELS // GROUPS, dim=1) for v in (B, C))
        return torch.exp(delta[..., None] * A[:, None]), (delta * u)[..., None] * B.transpose(2, 3), C

    def naive(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        decay, pushed, C = terms(u, delta, A, B, C, bias)
        state, out = torch.zeros_like(decay[:, :, 0]), []
        for t in range(u.shape[2]):
            state = decay[:, :, t] * state + pushed[:, :, t]
            out.append((state * C[..., t]).sum(-1))
        return torch.stack(out, dim=2) + D[:, None] * u

    def unbind(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        decay, pushed, C = terms(u, delta, A, B, C, bias)
        state, out = torch.zeros_like(decay[:, :, 0]), []
        for decay_t, pushed_t, c in zip(decay.unbind(2), pushed.unbind(2), C.unbind(3), strict=True):
            state = decay_t * state + pushed_t
            out.append((state * c).sum(-1))
        return torch.stack(out, dim=2) + D[:, None] * u

    def by(engine: str) -> Callable[..., Tensor]:
        def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            os.environ["MEDTUNE_SCAN"] = engine
            return selective_scan(u, delta, A, B, C, D, bias, delta_softplus=True)

        return run

    return {"ours": by("torch"), "unbind": unbind, "naive": naive, "triton": by("triton"), "mamba": by("mamba")}


def engines() -> dict[str, str]:
    """The engines that can run on this GPU."""
    import torch

    from medtune.ops.engines import _missing

    return {name: why for name, why in _missing(torch.cuda.current_device()).items() if not why}


STAGES = ((48, 56, 2), (96, 28, 2), (192, 14, 8), (384, 7, 2))
"""Of MedMamba-s at 224 px: width of the scanned half, side of the map, blocks."""


def stages(batch: int, repeats: int) -> None:
    """Milliseconds of each stage's scan and SS2D, forward and backward, by engine."""
    import torch

    print(f"\n{torch.cuda.get_device_name()}: MedMamba-s, 224 px, batch {batch}, bfloat16; ms, forward + backward")
    heads = "".join(f"{f'{side}x{side}, {2 * width}':>20}" for width, side, _ in STAGES)
    print(f"{'what':<22}{heads}{'all':>20}", flush=True)
    for name in engines():
        for what, make in (("scan", scan_alone), ("SS2D", ss2d)):
            times = [timed(make(name, width, side, batch), repeats) for width, side, _ in STAGES]
            blocks = [n for _, _, n in STAGES]
            forward, backward = (sum(n * t[i] for n, t in zip(blocks, times, strict=True)) for i in (0, 1))
            times.append((forward, backward))
            cells = "".join(f"{f'{there:.3f} + {back:.3f}':>20}" for there, back in times)
            print(f"{f'{name}, {what}':<22}{cells}", flush=True)


def scan_alone(engine: str, width: int, side: int, batch: int) -> tuple[Callable[[], Any], list[Any]]:
    """The four readings' scans, each engine given what it takes without a copy, and what is differentiated."""
    import torch

    from medtune.ops.triton_scan import triton_scan_map

    inner, length, states, readings = 2 * width, side * side, 16, 4
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def parameter(value: Any) -> Any:
        return value.clone().requires_grad_()

    decay = -torch.arange(1.0, states + 1, device="cuda")
    skip = parameter(torch.ones(readings * inner, device="cuda"))
    bias = parameter(torch.empty(readings * inner, device="cuda").uniform_(-6.9, -2.3, generator=g))
    if engine == "triton":
        x, projected = normal(batch, side, side, inner), normal(batch, side, side, readings * (inner + 2 * states))
        A = parameter(decay[:, None].expand(readings, states, inner))
        D, step = (v.view(readings, inner) for v in (skip, bias))
        return lambda: triton_scan_map(x, projected, A, D, step, True), [x, projected, A, skip, bias]
    u, delta = normal(batch, readings * inner, length), normal(batch, readings * inner, length)
    A = parameter(decay.expand(readings * inner, states))
    B, C = normal(batch, readings, states, length), normal(batch, readings, states, length)
    if engine == "mamba":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return lambda: selective_scan_fn(u, delta, A, B, C, skip, None, bias, True), [u, delta, A, B, C, skip, bias]
    function = variants()["ours"]
    return lambda: function(u, delta, A, B, C, skip, bias), [u, delta, A, B, C, skip, bias]


def ss2d(engine: str, width: int, side: int, batch: int) -> tuple[Callable[[], Any], list[Any]]:
    """MedMamba's whole branch under bfloat16 autocast, and what is differentiated."""
    import torch

    from medtune.models.medmamba import SS2D

    module = SS2D(width).cuda()
    x = torch.randn(batch, side, side, width, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def run() -> Any:
        os.environ["MEDTUNE_SCAN"] = engine
        with torch.autocast("cuda", torch.bfloat16):
            return module(x)

    return run, [x, *module.parameters()]


def timed(made: tuple[Callable[[], Any], list[Any]], repeats: int) -> tuple[float, float]:
    """Median milliseconds forward and backward of what is differentiated."""
    import torch

    function, values = made
    weight = torch.ones_like(function())
    return spans(function, lambda y: torch.autograd.grad(y, values, weight), repeats)


def spans(forward: Callable[[], Any], backward: Callable[[Any], Any], repeats: int) -> tuple[float, float]:
    """Median milliseconds of both, after two runs that compile.

    Behind a pause of the GPU of some 10 ms, during which all is launched: as in a CUDA graph, launching costs nothing.
    """
    import torch

    there, back = [], []
    for _ in range(2 + repeats):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        marks[0].record()
        y = forward()
        marks[1].record()
        backward(y)
        marks[2].record()
        torch.cuda.synchronize()
        there.append(marks[0].elapsed_time(marks[1]))
        back.append(marks[1].elapsed_time(marks[2]))
    return statistics.median(there[2:]), statistics.median(back[2:])


if __name__ == "__main__":
    main()
