"""What stands between MedMamba's blocks through the Triton kernels of `halves_kernels.py`: each way one pass over memory.

By PyTorch's operators the gradients of halves are put together, added to what goes round the block, and taken apart again in
kernels of their own. Maps are (B, H, W, C), sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from medtune.ops import halves_kernels as kernels
from medtune.ops.launch import given_or, on

TILE = 1024
"""Values of each half in a program."""


def triton_halves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, its first and its second half of channels."""
    return _Halves.apply(x)


def triton_join(x: Tensor, left: Tensor, right: Tensor, scale: Tensor | None) -> Tensor:
    """x (B, H, W, C) plus left and right (B, H, W, C / 2) by turns; right times its image's scale (B,), in float32."""
    return _Join.apply(x, left, right, scale)


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = x.chunk(2, dim=-1)
        return x.view_as(x), left, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dleft: Tensor, dright: Tensor) -> Tensor:
        dx, dleft, dright = (v.contiguous() for v in (dx, dleft, dright))
        total = torch.empty_like(dx)
        with on(dx):
            kernels.add_halves[_grid(dleft)](dx, dleft, dright, total, _rows(dleft), **_sizes(dleft))
        return total


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, scale: Tensor | None) -> Tensor:
        x, left, right = (v.contiguous() for v in (x, left, right))
        ctx.kinds = left.dtype, right.dtype
        ctx.save_for_backward(scale)
        out = torch.empty_like(x)
        with on(x):
            kernels.join[_grid(left)](
                x, left, right, given_or(scale, x), out, _rows(left), _positions(left),
                SCALED=scale is not None, **_sizes(left),
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        dout = dout.contiguous()
        half = (*dout.shape[:-1], dout.shape[-1] // 2)
        dleft, dright = (dout.new_empty(half, dtype=kind) for kind in ctx.kinds)
        with on(dout):
            kernels.part[_grid(dleft)](
                dout, given_or(scale, dout), dleft, dright, _rows(dleft), _positions(dleft),
                SCALED=scale is not None, **_sizes(dleft),
            )  # fmt: skip
        return dout, dleft, dright, None


def _rows(half: Tensor) -> int:
    return half.numel() // half.shape[-1]


def _positions(half: Tensor) -> int:
    """Of an image."""
    return max(1, half.shape[1] * half.shape[2])


def _sizes(half: Tensor) -> dict[str, int]:
    channels = half.shape[-1]
    block = next((b for b in (64, 32) if channels % b == 0), min(64, max(16, triton.next_power_of_2(channels))))
    return {"H": channels, "ROWS": TILE // block, "BLOCK": block, "num_warps": 4}


def _grid(half: Tensor) -> tuple[int]:
    sizes = _sizes(half)
    return (max(1, triton.cdiv(_rows(half), sizes["ROWS"])) * triton.cdiv(half.shape[-1], sizes["BLOCK"]),)
