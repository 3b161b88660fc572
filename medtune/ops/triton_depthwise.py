"""SiLU of a depth-wise 3x3 convolution through the Triton kernels of `depthwise_kernels.py`, channels last.

Float32 arithmetic for float32, bfloat16 and float16 in and out, whatever autocast says. The operators are opaque to
torch.compile and can be captured in CUDA graphs; nothing is added atomically: same input, same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from medtune.ops import depthwise_kernels as kernels
from medtune.ops.launch import dense_rows, given_or, on
from medtune.ops.parts import add_parts

TILE, BACKWARD_TILE = (7, 4), (7, 2)
"""Rows and columns of a lane's positions at most: more load less for each, but take longer to compile (by their cube)."""
AHEAD = 4
"""Lines of a tile that are asked for before the first is computed."""
WARPS = 4
PROGRAMS = 2048
"""Parts, about, in which the backward pass adds up the gradients of the weights."""


def triton_depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(conv2d(x, weight, bias, padding=1)): x (B, H, W, D), any strides; weight (D, 1, 3, 3); bias (D). y like x."""
    taps = weight.flatten(1).mT.float().contiguous()  # (9, D): channels side by side, as x has them
    return torch.ops.medtune.depthwise_silu(dense_rows(x), taps, None if bias is None else bias.float().contiguous())


@torch.library.custom_op("medtune::depthwise_silu", mutates_args=())
def _forward(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape)
    launch_forward(x, taps, bias, y)
    return y


@_forward.register_fake
def _output(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing computes them anew at each look
    dx, sums = torch.ops.medtune.depthwise_silu_backward(*saved, dy)
    return dx, sums[:9], None if saved[2] is None else sums[9]


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("medtune::depthwise_silu_backward", mutates_args=())
def _backward(x: Tensor, taps: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and, in one (10, D), of the nine taps and the bias."""
    dx = x.new_empty(x.shape)
    return dx, add_parts(launch_backward(x, taps, bias, dy, dx)[None])[0]


@_backward.register_fake
def _gradients(x: Tensor, taps: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), taps.new_empty((10, x.shape[3]))


def launch_forward(x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill y; x, y: (B, H, W, D), channels side by side; taps: (9, D), bias: (D,), in float32."""
    _convolve(x, taps, bias, y, back=False)


def launch_backward(x: Tensor, taps: Tensor, bias: Tensor | None, dy: Tensor, dx: Tensor) -> Tensor:
    """Fill dx, which may be a half of wider rows; parts (K, 10, D), of the gradients of taps and bias."""
    dy = dense_rows(dy)
    ds = x.new_empty(x.shape)
    sizes = _sizes(x, BACKWARD_TILE)
    tiles, blocks = _tiles(x, sizes), triton.cdiv(x.shape[3], sizes["BLOCK"])
    groups = triton.cdiv(tiles, sizes["SIDE"])
    each = max(1, triton.cdiv(groups * blocks, PROGRAMS))
    programs = triton.cdiv(groups, each)
    sums = taps.new_empty((programs, 10, x.shape[3]))
    with on(x):
        kernels.depthwise_backward[(programs * blocks,)](
            x, taps, given_or(bias, taps), dy, ds, sums, x.shape[0], each, x.stride(0), dy.stride(0),
            ROW=x.stride(1), COLUMN=x.stride(2), DY_ROW=dy.stride(1), DY_COLUMN=dy.stride(2),
            HAS_BIAS=bias is not None, **sizes,
        )  # fmt: skip
    _convolve(ds, taps, None, dx, back=True)
    return sums


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor, back: bool) -> None:
    """Fill y with x' convolution and its SiLU, or, `back`, with the gradient of what was convolved, of the output's, x."""
    sizes = _sizes(x, BACKWARD_TILE if back else TILE)
    programs = triton.cdiv(_tiles(x, sizes), sizes["SIDE"]) * triton.cdiv(x.shape[3], sizes["BLOCK"])
    with on(x):
        kernels.depthwise[(programs,)](
            x, taps, given_or(bias, taps), y, x.shape[0], x.stride(0), y.stride(0),
            ROW=x.stride(1), COLUMN=x.stride(2), Y_ROW=y.stride(1), Y_COLUMN=y.stride(2),
            HAS_BIAS=bias is not None, BACK=back, **sizes,
        )  # fmt: skip


def _tiles(x: Tensor, sizes: dict[str, int]) -> int:
    return x.shape[0] * triton.cdiv(x.shape[1], sizes["ROWS"]) * triton.cdiv(x.shape[2], sizes["COLUMNS"])


def _sizes(x: Tensor, tile: tuple[int, int]) -> dict[str, int]:
    """Constants of the kernels for maps like x: (B, H, W, D), and tiles of so many rows and columns at most."""
    _, height, width, channels = x.shape
    rows, columns = _part(height, tile[0]), _part(width, tile[1])
    block = 64 if channels % 64 == 0 else 32
    sizes = {"HEIGHT": height, "WIDTH": width, "CHANNELS": channels, "ROWS": rows, "COLUMNS": columns}
    return {**sizes, "AHEAD": min(AHEAD, rows + 1), "SIDE": 64 * WARPS // block, "BLOCK": block, "num_warps": WARPS}


def _part(side: int, most: int) -> int:
    """Lines of a tile, for the least work: each costs the same, on the map or off it, and a tile's halo a third of one."""
    return min(range(1, most + 1), key=lambda lines: triton.cdiv(side, lines) * (3 * lines + 1))
