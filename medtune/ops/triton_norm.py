"""A layer norm, gated or not, through the Triton kernels of `norm_kernels.py`.

Float32 arithmetic for float32, bfloat16 and float16 in and out. The operator is opaque to torch.compile, and can be captured
in CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from medtune.ops import norm_kernels as kernels
from medtune.ops.launch import dense_rows, on
from medtune.ops.parts import add_parts

WARPS = 4
"""Warps of a program."""
LANE = 4
"""Channels of a piece in a lane: 8 bytes of bfloat16, so that registers let many warps run at once."""
STAGES = 3
"""A tile is asked for STAGES - 1 tiles before it is computed with, and waits in shared memory."""
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8, 3
"""Of a multiprocessor, as many as its registers hold at once; half of them where a lane has twice the channels."""


def triton_gated_norm(y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(y) * silu(z) in z's dtype, or norm(y) in y's where z is None; y, z: (..., D); weight, bias: (D,).

    Raises ValueError when shapes do not fit, or for an eps that is not above 0.
    """
    if weight.shape != y.shape[-1:] or bias.shape != weight.shape or (z is not None and z.shape != y.shape):
        shapes = [None if v is None else tuple(v.shape) for v in (y, z, weight, bias)]
        raise ValueError(f"y and z must be (..., D), weight and bias (D,), got {', '.join(map(str, shapes))}")
    if not eps > 0:  # rows past the end are zeros, whose deviation is divided by
        raise ValueError(f"eps must be above 0, got {eps}")
    weight, bias = (v.float().contiguous() for v in (weight, bias))
    return torch.ops.medtune.gated_norm(y, z, weight, bias, eps)


@torch.library.custom_op("medtune::gated_norm", mutates_args=())
def _forward(y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = _output(y, z, weight, bias, eps)
    launch_forward(y, z, weight, bias, out, eps)
    return out


@_forward.register_fake
def _output(y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (y if z is None else z).new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing computes them anew at each look
    dy, dz, dparameters = torch.ops.medtune.gated_norm_backward(*saved, dout, ctx.eps)
    dweight, dbias = dparameters.unbind(0)
    return dy, None if saved[1] is None else dz, dweight, dbias, None


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("medtune::gated_norm_backward", mutates_args=())
def _backward(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, dout: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dz, _ = _gradients(y, z, weight, bias, dout, eps)
    parts = launch_backward(y, z, weight, bias, dout, dy, None if z is None else dz, eps)
    return dy, dz, add_parts(parts[None])[0]


@_backward.register_fake
def _gradients(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, dout: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dz (of no elements where there is no z), and dweight over dbias (2, D)."""
    dz = y.new_empty(0) if z is None else z.new_empty(z.shape)
    return y.new_empty(y.shape), dz, weight.new_empty((2, len(weight)))


def launch_forward(y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor, eps: float) -> None:
    """Fill out, contiguous and of any dtype; y, z: (..., D); weight, bias: (D,) in float32."""
    flat, gate = _flat(y), _flat(y if z is None else z)
    sizes = _sizes(y.shape[-1])
    programs = _programs(y, len(flat), sizes, FORWARD_PROGRAMS)
    with on(y):
        kernels.norm_forward[(programs,)](
            flat, gate, weight, bias, out, flat.stride(0), gate.stride(0), len(flat), eps, GATED=z is not None, **sizes
        )


def launch_backward(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, dout: Tensor, dy: Tensor, dz: Tensor | None, eps: float
) -> Tensor:
    """Fill dy, contiguous, and dz, which may be a half of wider rows; parts (K, 2, D), of dweight over dbias."""
    flat, gate, slope = _flat(y), _flat(y if z is None else z), _flat(dout)
    along = dy if dz is None else dz.view(-1, dz.shape[-1])
    sizes = _sizes(y.shape[-1])
    programs = _programs(y, len(flat), sizes, BACKWARD_PROGRAMS)
    sums = weight.new_empty((programs, 2, len(weight)))
    with on(y):
        kernels.norm_backward[(programs,)](
            flat, gate, weight, bias, slope, dy, along, sums,
            flat.stride(0), gate.stride(0), slope.stride(0), along.stride(0), len(flat), eps, GATED=z is not None, **sizes,
        )  # fmt: skip
    return sums


def _sizes(channels: int) -> dict[str, int]:
    """How a row is cut into pieces, at most three, and how many rows are a tile.

    A lane has twice LANE of a piece where a row would be in several warps else.
    """
    block = max(16, triton.next_power_of_2(triton.cdiv(channels, 3)))
    lane = min(max(LANE, block // 32), 2 * LANE)
    sizes = {"D": channels, "PARTS": triton.cdiv(channels, block), "BLOCK": block, "STAGES": STAGES}
    return {**sizes, "ROWS": max(1, 32 * WARPS * lane // block), "num_warps": WARPS, "num_stages": 1}


def _programs(x: Tensor, rows: int, sizes: dict[str, int], each: int) -> int:
    """At most `each` for a multiprocessor, and all with as many tiles, but for the last."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    large = sizes["ROWS"] * sizes["BLOCK"] > 32 * WARPS * LANE
    tiles = max(1, triton.cdiv(rows, sizes["ROWS"]))
    return triton.cdiv(tiles, triton.cdiv(tiles, processors * (each // 2 if large else each)))


def _flat(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D), channels side by side in memory and rows one distance apart; copied only where it lies else."""
    return dense_rows(x.reshape(-1, x.shape[-1]))
