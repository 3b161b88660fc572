"""The selective scan through the Triton kernels of `triton_kernels.py`: along sequences, and over a map in four readings.

Float32 states and arithmetic for float32, bfloat16 and float16 in and out, whatever autocast says: casting is the caller's.
The operators are opaque to torch.compile, which neither breaks there nor looks inside; they can be captured in CUDA graphs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from medtune.ops import triton_kernels as kernels

CHUNK = 8
"""Positions in a tile, as many as tensor cores' sums have rows; the state that enters each is kept for the backward pass."""
WARPS = 4
"""Warps of a program, which share its states out: as many as there are states at most, and more for more than 16."""
FORWARD_REGISTERS, BACKWARD_REGISTERS = 128, 168
"""A lane may have so many: fewer, and more programs are on a multiprocessor at once, but values are put into memory."""
LANES = 32
"""Channels of a program, one for each lane of its warp."""
LONGEST = 2**20
"""Positions of a map, whose places are found in float32 (`_place`)."""


def triton_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    """u, delta: (G, batch, L, d), any strides; A: (G, N, d); B, C: (G, batch, N, L); D, bias: (G, d). Returns y like u."""
    mix = torch.cat((B.float(), C.float()), dim=2)
    mix = F.pad(mix, (0, -u.shape[2] % CHUNK)).unflatten(3, (-1, CHUNK)).transpose(2, 3).contiguous()
    return _scan(u, delta, A, mix, D, bias, softplus, 0, 0)


def triton_scan_map(
    x: Tensor, delta: Tensor, A: Tensor, mix: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    """The four readings of a map (`to_directions`), each scanned, put back and added up: x (B, H, W, D) -> the same.

    delta: (4, B, H W, D) and mix: (B, H W, 4, 2 N), which is B over C, lie where x does, not in the readings' order;
    A: (4, N, D); D, bias: (4, D). Nothing is copied into the readings' order but mix, which is small.
    """
    images, height, width, channels = x.shape
    if height * width > LONGEST:
        raise ValueError(f"a map may have {LONGEST} positions, got {height} x {width}")
    u = x.reshape(images, height * width, channels).expand(delta.shape[0], -1, -1, -1)
    y = _scan(u, delta, A, torch.ops.medtune.mix_readings(mix, height, width), D, bias, softplus, height, width)
    return y.sum(0).view(x.shape)  # PyTorch adds up bfloat16 in float32


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, mix: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool, height: int,
    width: int,
) -> Tensor:  # fmt: skip
    u, delta = _rows(u), _rows(delta)
    inputs = [u, delta, A, mix, D, bias]
    keep = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    D, bias = (None if v is None else v.float().contiguous() for v in (D, bias))
    A = A.float().contiguous()
    y, _ = torch.ops.medtune.triton_scan(u, delta, A, mix, D, bias, softplus, height, width, keep)
    return y


@torch.library.custom_op("medtune::triton_scan", mutates_args=())
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, mix: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool,
    height: int, width: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, states = _outputs(u, delta, A, mix, D, bias, softplus, height, width, keep)
    readings, images, length, channels = u.shape
    with _on(u):
        kernels.scan_forward[(triton.cdiv(channels, LANES), readings * images)](
            u, delta, A, mix, _or(D, A), _or(bias, A), y, states, *u.stride()[:3], *delta.stride()[:3],
            images, length, channels, height, width, 0,
            HAS_SKIP=D is not None, HAS_BIAS=bias is not None, SOFTPLUS=softplus, MAP=height > 0, KEEP=keep,
            **_sizes(A, mix, FORWARD_REGISTERS),
        )  # fmt: skip
    return y, states


@_forward.register_fake
def _outputs(
    u: Tensor, delta: Tensor, A: Tensor, mix: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool,
    height: int, width: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    readings, images, _, channels = u.shape
    chunks = mix.shape[2] if keep else 0
    states = u.new_empty((readings, images, -(-channels // LANES), chunks, A.shape[1], LANES), dtype=torch.float32)
    return u.new_empty(u.shape), states


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.height, ctx.width, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # the states' would be zeros, of gigabytes


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing computes them anew at each look
    *_, D, bias, _ = saved
    grads = torch.ops.medtune.triton_scan_backward(*saved, dy, ctx.softplus, ctx.height, ctx.width)
    du, ddelta, dA, dmix, dD, dbias = grads
    return du, ddelta, dA, dmix, None if D is None else dD, None if bias is None else dbias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("medtune::triton_scan_backward", mutates_args=())
def _backward(
    u: Tensor, delta: Tensor, A: Tensor, mix: Tensor, D: Tensor | None, bias: Tensor | None, states: Tensor, dy: Tensor,
    softplus: bool, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    readings, images, length, channels = u.shape
    dy = _rows(dy)
    du, ddelta = u.new_empty(u.shape), torch.empty_like(delta)  # in delta's order in memory: spares a product's input a copy
    blocks = triton.cdiv(channels, LANES)
    dA = A.new_empty((readings, images, A.shape[1], channels))
    dmix = A.new_empty((blocks, *mix.shape))
    dD, dbias = (A.new_zeros((readings, images, channels)) for _ in range(2))
    with _on(u):
        kernels.scan_backward[(blocks, readings * images)](
            u, delta, A, mix, _or(D, A), _or(bias, A), states, dy, du, ddelta, dA, dmix, dD, dbias,
            *u.stride()[:3], *delta.stride()[:3], *dy.stride()[:3], *ddelta.stride()[:3],
            images, length, channels, height, width, 0,
            HAS_SKIP=D is not None, HAS_BIAS=bias is not None, SOFTPLUS=softplus, MAP=height > 0,
            MMA=_has_tensor_cores(u), EXACT=delta.dtype == torch.float32,
            **_sizes(A, mix, BACKWARD_REGISTERS),
        )  # fmt: skip
    return du, ddelta, dA.sum(1), dmix.sum(0), dD.sum(1), dbias.sum(1)


def _sizes(A: Tensor, mix: Tensor, registers: int) -> dict[str, int]:
    """How a program's states are shared out among its warps: four each at most, whose code is one after the other."""
    states = A.shape[1]
    warps = min(max(WARPS, triton.next_power_of_2(triton.cdiv(states, 4))), triton.next_power_of_2(states))
    each = triton.next_power_of_2(triton.cdiv(states, warps))
    sizes = {"N": states, "M": each, "G": warps, "T": mix.shape[4], "BLOCK": LANES}
    return {**sizes, "num_warps": warps, "num_stages": 1, "maxnreg": min(registers, 2048 // warps)}  # of 65536 in all


@_backward.register_fake
def _gradients(
    u: Tensor, delta: Tensor, A: Tensor, mix: Tensor, D: Tensor | None, bias: Tensor | None, states: Tensor, dy: Tensor,
    softplus: bool, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    per_channel = A.new_empty((A.shape[0], A.shape[2]))
    like = u.new_empty(u.shape), torch.empty_like(delta), torch.empty_like(A), torch.empty_like(mix)
    return *like, per_channel, torch.empty_like(per_channel)


def _has_tensor_cores(u: Tensor) -> bool:
    """Whether there are TF32 matrix products, in NVIDIA's instructions, to add up with."""
    return u.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(u.device) >= (8, 0)


@torch.library.custom_op("medtune::mix_readings", mutates_args=())
def _mix(source: Tensor, height: int, width: int) -> Tensor:
    """(B, H W, 4, 2 N) -> (4, B, chunks, 2 N, CHUNK), in float32, each reading in its order, zero past the end."""
    mix = _mixed(source, height, width)
    _launch_mix(source, mix, height, width, back=False)
    return mix


@_mix.register_fake
def _mixed(source: Tensor, height: int, width: int) -> Tensor:
    images, length, readings, columns = source.shape
    return source.new_empty((readings, images, -(-length // CHUNK), columns, CHUNK), dtype=torch.float32)


@torch.library.custom_op("medtune::unmix_readings", mutates_args=())
def _unmix(mix: Tensor, height: int, width: int) -> Tensor:
    """What `mix_readings` made, back where it was, in float32: (B, H W, 4, 2 N)."""
    source = _unmixed(mix, height, width)
    _launch_mix(source, mix.contiguous(), height, width, back=True)
    return source


@_unmix.register_fake
def _unmixed(mix: Tensor, height: int, width: int) -> Tensor:
    readings, images, _, columns, _ = mix.shape
    return mix.new_empty((images, height * width, readings, columns))


def _launch_mix(source: Tensor, mix: Tensor, height: int, width: int, back: bool) -> None:
    readings, images, chunks, columns, chunk = mix.shape
    strides = (source.stride(i) for i in (0, 1, 2, 3))
    with _on(mix):
        kernels.mix_readings[(triton.cdiv(chunks * chunk, LANES), readings * images)](
            source, mix, *strides, images, height * width, chunks, height, width,
            BACK=back, WIDTH=columns, COLUMNS=triton.next_power_of_2(columns), T=chunk, BLOCK=LANES,
            num_warps=4,
        )  # fmt: skip


def _save_map(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.map, ctx.dtype = inputs[1:], inputs[0].dtype


def _differentiate_mix(ctx: Any, dmix: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.medtune.unmix_readings(dmix, *ctx.map).to(ctx.dtype), None, None


_mix.register_autograd(_differentiate_mix, setup_context=_save_map)


def _rows(x: Tensor) -> Tensor:
    """x with channels side by side in memory, as the kernels want them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(x: Tensor | None, instead: Tensor) -> Tensor:
    """A kernel takes an address also of what it does not read."""
    return instead if x is None else x


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
