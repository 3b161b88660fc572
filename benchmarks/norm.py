"""The norm and gate behind a scan on a GPU: our kernels beside PyTorch's operators, eager and compiled.

Run:     python -m benchmarks.norm        (--sweep: also others of LANE, STAGES and programs of a multiprocessor)
Shape:   the stages of MedMamba-s at 224 px and `--batch` images; y (B, H, W, D) and z, half of rows twice as wide, bfloat16
Time:    medians of CUDA events, microseconds, forward + backward; in brackets the rate at which forward reads y and z and
         writes the result, and backward reads y, z and dout and writes dy and dz. Later stages' maps stay in the L2 cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.scan import STAGES, timed
from medtune.ops import triton_norm

VARIANTS = ((4, 1, 8, 4), (4, 2, 8, 4), (4, 2, 8, 6), (4, 3, 6, 3), (4, 3, 8, 5), (4, 3, 8, 6), (8, 3, 4, 2), (8, 3, 8, 4))
Norm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}: batch {options.batch}, bfloat16; us (TB/s), forward + backward")
    print(" " * 22 + "".join(f"{f'{side}x{side}, {2 * width}':>30}" for width, side, _ in STAGES))
    line("PyTorch", plain, options)
    line("PyTorch, compiled", torch.compile(plain, dynamic=False), options)
    line("ours", ours, options)
    for lane, stages, forward, backward in VARIANTS if options.sweep else ():
        triton_norm.LANE, triton_norm.STAGES = lane, stages
        triton_norm.FORWARD_PROGRAMS, triton_norm.BACKWARD_PROGRAMS = forward, backward
        line(f"{lane}, {stages}, {forward} and {backward}", ours, options)


def ours(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return triton_norm.triton_gated_norm(y, z, weight, bias, 1e-5)


def plain(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As the models' next product takes it."""
    with torch.autocast("cuda", torch.bfloat16):
        return (F.layer_norm(y, weight.shape, weight, bias, 1e-5) * F.silu(z)).to(y.dtype)


def line(what: str, norm: Norm, options: argparse.Namespace) -> None:
    cells = []
    for width, side, _ in STAGES:
        made = inputs(norm, options.batch, side, 2 * width)
        megabytes = 2e-6 * made[1][0].numel()
        there, back = (1e3 * milliseconds for milliseconds in timed(made, options.repeats))
        cells.append(f"{there:.1f} + {back:.1f} ({3 * megabytes / there:.1f}, {5 * megabytes / back:.1f})")
    print(f"{what:<22}" + "".join(f"{cell:>30}" for cell in cells), flush=True)


def inputs(norm: Norm, batch: int, side: int, channels: int) -> tuple[Callable[[], Tensor], list[Any]]:
    """What runs, and what is differentiated."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=g, device="cuda", dtype=dtype)

    y = normal(batch, side, side, channels).requires_grad_()
    z = normal(batch, side, side, 2 * channels)[..., channels:].requires_grad_()
    weight, bias = (normal(channels, dtype=torch.float32).requires_grad_() for _ in range(2))
    return lambda: norm(y, z, weight, bias), [y, z, weight, bias]


if __name__ == "__main__":
    main()
