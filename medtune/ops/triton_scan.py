"""The selective scan through the Triton kernels of `triton_kernels.py`: along sequences, and over a map in four readings.

Float32 states and arithmetic for float32, bfloat16 and float16 in and out, whatever autocast says: casting is the caller's.
The operators are opaque to torch.compile, which neither breaks there nor looks inside; they can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from medtune.ops import triton_kernels as kernels
from medtune.ops.launch import dense_rows, given_or, on
from medtune.ops.parts import add_parts

CHUNK = 8
"""Positions in a tile, as many as tensor cores' sums have rows; the state that enters each is kept for the backward pass."""
WARPS = 4
"""Warps of a program, which share its states out: as many as there are states at most, and more for more than 16."""
FORWARD_REGISTERS, BACKWARD_REGISTERS = 80, 168
"""A lane may have so many: fewer, and more programs are on a multiprocessor at once, but values are put into memory."""
LANES = 32
"""Channels of a program, one for each lane of its warp."""
UNMIXED, ADDED = 8, 2048
"""Chunks of a program of `unmix_readings`, values of one of `add_up`."""
LONGEST = 2**20
"""Positions of a map, whose places are found in float32 (`_place`)."""
FARTHEST, MOST_PROGRAMS = 2**31 - 1, 65535
"""A position's place in memory is counted in 32 bits within an image; CUDA takes so many programs beside each other."""


def triton_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    """u, delta: (G, batch, L, d), any strides; A: (G, N, d); B, C: (G, batch, N, L); D, bias: (G, d). Returns y like u."""
    mix = torch.cat((B.float(), C.float()), dim=2)
    mix = F.pad(mix, (0, -u.shape[2] % CHUNK)).unflatten(3, (-1, CHUNK)).transpose(2, 3).contiguous()
    return _scan(u, delta, A, mix, D, bias, softplus)


def triton_scan_map(
    x: Tensor, projected: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    """The four readings of a map (`to_directions`), each scanned, put back and added up: x (B, H, W, D) -> the same.

    projected: (B, H, W, 4 D + 4 * 2 N), a position's steps for each reading and channel, then B over C for each reading;
    A: (4, N, D); D, bias: (4, D). Nothing is copied into the readings' order but B and C, which are small.
    """
    inputs = (dense_rows(x), dense_rows(projected), *_parameters(A, D, bias))
    y, *_ = torch.ops.medtune.scan_map(*inputs, softplus, _kept(*inputs))
    return y


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, mix: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    inputs = (dense_rows(u), dense_rows(delta), *_parameters(A, D, bias), mix)
    y, _ = torch.ops.medtune.scan(*inputs, softplus, _kept(*inputs))
    return y


def _parameters(A: Tensor, D: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    D, bias = (None if v is None else v.float().contiguous() for v in (D, bias))
    return A.float().contiguous(), D, bias


def _kept(*inputs: Tensor | None) -> bool:
    """Whether states are to be kept for a backward pass."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)


@torch.library.custom_op("medtune::scan", mutates_args=())
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, mix: Tensor, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """y like u, contiguous, and what enters each chunk."""
    y, states = _outputs(u, delta, A, D, bias, mix, softplus, keep)
    _launch_forward(u, delta, A, D, bias, mix, softplus, (0, 0), y, states)
    return y, states


@_forward.register_fake
def _outputs(
    u: Tensor, delta: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, mix: Tensor, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), _states(u, A, mix, keep)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # the states' would be zeros, of gigabytes


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing computes them anew at each look
    du, ddelta, sums, dmix = torch.ops.medtune.scan_backward(*saved, dy, ctx.softplus)
    return du, ddelta, *_parameters_of(sums, *saved[3:5]), dmix, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("medtune::scan_backward", mutates_args=())
def _backward(
    u: Tensor, delta: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, mix: Tensor, states: Tensor, dy: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u and delta, those of A, D and bias as (K, N + 2, channels), that of mix."""
    ddelta = torch.empty_like(delta)
    du, sums, each = _launch_backward(u, delta, A, D, bias, mix, states, dense_rows(dy), softplus, (0, 0), ddelta)
    dmix = torch.empty_like(mix)
    _add_up(each, dmix)
    return du, ddelta, add_parts(sums), dmix


@_backward.register_fake
def _gradients(
    u: Tensor, delta: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, mix: Tensor, states: Tensor, dy: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return u.new_empty(u.shape), torch.empty_like(delta), _sums(A), torch.empty_like(mix)


@torch.library.custom_op("medtune::scan_map", mutates_args=())
def _forward_map(
    x: Tensor, projected: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, contiguous; what enters each chunk; B over C in the readings' order, as `_launch_forward` takes it."""
    return launch_map(x, *_parts(projected, A), A, D, bias, softplus, keep)


@_forward_map.register_fake
def _outputs_of_map(
    x: Tensor, projected: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    images, length = x.shape[0], x.shape[1] * x.shape[2]
    mixed = A.new_empty((A.shape[0], images, -(-length // CHUNK), 2 * A.shape[1], CHUNK))
    return x.new_empty(x.shape), _states(x, A, mixed, keep), mixed


def launch_map(
    x: Tensor, delta: Tensor, mix: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator of that name, of steps (K, B, H W, D) and B over C (B, H W, K, 2 N), by strides.

    Raises ValueError for a map of too many positions.
    """
    height, width = x.shape[1:3]
    if height * width > LONGEST:
        raise ValueError(f"a map may have {LONGEST} positions, got {height} x {width}")
    y, states, mixed = _outputs_of_map(x, delta, A, D, bias, softplus, keep)
    readings, images, chunks, columns, _ = mixed.shape
    size = x.shape[1:3]
    with on(x):
        kernels.mix_readings[(triton.cdiv(chunks * CHUNK, LANES), readings * images)](
            mix, mixed, *mix.stride(), images, size[0] * size[1], chunks, *size,
            WIDTH=columns, COLUMNS=triton.next_power_of_2(columns), T=CHUNK, BLOCK=LANES, num_warps=4,
        )  # fmt: skip
    each = x.new_empty((readings, *y.shape))
    _launch_forward(_read(x, readings), delta, A, D, bias, mixed, softplus, size, each, states)
    _add_up(each, y)
    return y, states, mixed


def _save_map(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_map(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, dprojected, sums = torch.ops.medtune.scan_map_backward(*saved, dy, ctx.softplus)
    return dx, dprojected, *_parameters_of(sums, *saved[3:5]), None, None


_forward_map.register_autograd(_differentiate_map, setup_context=_save_map)


@torch.library.custom_op("medtune::scan_map_backward", mutates_args=())
def _backward_map(
    x: Tensor, projected: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, states: Tensor, mixed: Tensor,
    dy: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and projected, those of A, D and bias as (K, N + 2, channels)."""
    dprojected = torch.empty_like(projected)
    delta, _ = _parts(projected, A)
    dx, sums = launch_map_backward(x, delta, A, D, bias, states, mixed, dy, softplus, *_parts(dprojected, A))
    return dx, dprojected, add_parts(sums)


def launch_map_backward(
    x: Tensor, delta: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, states: Tensor, mixed: Tensor,
    dy: Tensor, softplus: bool, ddelta: Tensor, dmix: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of x, each image's of A, D and bias (K, B, N + 2, D), to be summed; fills ddelta and dmix, by strides."""
    dx = x.new_empty(x.shape)
    readings, images, chunks, columns, _ = mixed.shape
    size, inputs = x.shape[1:3], (_read(x, readings), delta, A, D, bias, mixed, states)
    du, sums, dmixed = _launch_backward(*inputs, _read(dense_rows(dy), readings), softplus, size, ddelta)
    _add_up(du, dx)
    with on(x):
        kernels.unmix_readings[(triton.cdiv(chunks, UNMIXED), readings * images)](
            dmixed, dmix, *dmix.stride()[:3], images, size[0] * size[1], chunks, dmixed.shape[0], *size,
            WIDTH=columns, COLUMNS=triton.next_power_of_2(columns), T=CHUNK, CHUNKS=UNMIXED, num_warps=4,
        )  # fmt: skip
    return dx, sums


@_backward_map.register_fake
def _gradients_of_map(
    x: Tensor, projected: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, states: Tensor, mixed: Tensor,
    dy: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), projected.new_empty(projected.shape), _sums(A)


def _parts(projected: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """A map's steps (K, B, H W, D), and its B over C (B, H W, K, 2 N), nothing copied of a dense map."""
    readings, states, channels = A.shape
    delta, mix = projected.flatten(1, 2).split((readings * channels, readings * 2 * states), dim=-1)
    return delta.unflatten(-1, (readings, channels)).permute(2, 0, 1, 3), mix.unflatten(-1, (readings, 2 * states))


def _read(x: Tensor, readings: int) -> Tensor:
    """A map (B, H, W, D) as what each reading visits: (K, B, H W, D), nothing copied of a dense one."""
    return x.flatten(1, 2).expand(readings, -1, -1, -1)


def _add_up(each: Tensor, total: Tensor) -> None:
    """Fill total with the sum of K tensors like it, (K, ...), all contiguous; added up in float32."""
    count = total.numel()
    with on(total):
        kernels.add_up[(triton.cdiv(count, ADDED),)](each, total, count, K=len(each), BLOCK=ADDED, num_warps=4)


def _states(like: Tensor, A: Tensor, mixed: Tensor, keep: bool) -> Tensor:
    """Room for what enters each chunk of a scan of activations like these, none without `keep`.

    Rounded as activations are: they are most of what a scan writes and its backward pass reads, which computes in float32.
    """
    (readings, images, chunks), (states, channels) = mixed.shape[:3], A.shape[1:]
    shape = (readings, images, -(-channels // LANES), chunks if keep else 0, states, LANES)
    return A.new_empty(shape, dtype=torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32)


def _sums(A: Tensor) -> Tensor:
    return A.new_empty((A.shape[0], A.shape[1] + 2, A.shape[2]))


def _parameters_of(sums: Tensor, D: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of A, D and bias."""
    return sums[:, :-2], None if D is None else sums[:, -2], None if bias is None else sums[:, -1]


def _launch_forward(
    u: Tensor, delta: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, mix: Tensor, softplus: bool,
    size: Sequence[int], y: Tensor, states: Tensor,
) -> None:  # fmt: skip
    """u, delta: (K, images, L, D); mix: (K, images, chunks, 2 N, CHUNK); size: a map's height and width, or (0, 0).

    Fills y, (K, images, L, D), and states where it has room.
    """
    readings, images, length, channels = u.shape
    _require_countable(u, delta)
    with on(u):
        kernels.scan_forward[(triton.cdiv(channels, LANES), readings * images)](
            u, delta, A, mix, given_or(D, A), given_or(bias, A), y, states, *u.stride()[:3], *delta.stride()[:3],
            images, length, channels, *size, 0,
            HAS_SKIP=D is not None, HAS_BIAS=bias is not None, SOFTPLUS=softplus, MAP=size[0] > 0,
            KEEP=states.numel() > 0, **_sizes(A, mix, FORWARD_REGISTERS),
        )  # fmt: skip


def _launch_backward(
    u: Tensor, delta: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, mix: Tensor, states: Tensor, dy: Tensor,
    softplus: bool, size: Sequence[int], ddelta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u (K, images, L, D), each image's of A, D and bias (K, images, N + 2, D), each block's of mix.

    Fills ddelta, (K, images, L, D).
    """
    readings, images, length, channels = u.shape
    _require_countable(u, delta, dy)
    du = u.new_empty(u.shape)
    blocks = triton.cdiv(channels, LANES)
    sums = A.new_empty((readings, images, A.shape[1] + 2, channels))
    # What each block gives is rounded to the gradient's type at once, and the sum once more: half of the memory.
    dmix = mix.new_empty((blocks, *mix.shape), dtype=torch.bfloat16 if delta.dtype == torch.bfloat16 else mix.dtype)
    with on(u):
        kernels.scan_backward[(blocks, readings * images)](
            u, delta, A, mix, given_or(D, A), given_or(bias, A), states, dy, du, ddelta, sums, dmix,
            *u.stride()[:3], *delta.stride()[:3], *dy.stride()[:3], *ddelta.stride()[:3],
            images, length, channels, *size, 0,
            HAS_SKIP=D is not None, HAS_BIAS=bias is not None, SOFTPLUS=softplus, MAP=size[0] > 0,
            MMA=_has_tensor_cores(u), EXACT=delta.dtype == torch.float32,
            **_sizes(A, mix, BACKWARD_REGISTERS),
        )  # fmt: skip
    return du, sums, dmix


def _require_countable(*given: Tensor) -> None:
    """Raise ValueError where kernels cannot count (readings, images) or positions of one of given (K, images, L, D)."""
    readings, images = given[0].shape[:2]
    if readings * images > MOST_PROGRAMS:
        most = MOST_PROGRAMS // readings
        raise ValueError(f"at most {most} images at once are scanned in {readings} readings, got {images}")
    for x in given:
        if (x.shape[2] - 1) * x.stride(2) + x.shape[3] > FARTHEST:
            raise ValueError(f"{x.shape[2]} positions of {x.stride(2)} values each are too many to scan: {FARTHEST} at most")


def _sizes(A: Tensor, mix: Tensor, registers: int) -> dict[str, int]:
    """How a program's states are shared out among its warps: four each at most, whose code is one after the other."""
    states = A.shape[1]
    warps = min(max(WARPS, triton.next_power_of_2(triton.cdiv(states, 4))), triton.next_power_of_2(states))
    each = triton.next_power_of_2(triton.cdiv(states, warps))
    sizes = {"N": states, "M": each, "G": warps, "T": mix.shape[4], "BLOCK": LANES}
    return {**sizes, "num_warps": warps, "num_stages": 1, "maxnreg": min(registers, 2048 // warps)}  # of 65536 in all


def _has_tensor_cores(u: Tensor) -> bool:
    """Whether there are TF32 matrix products, in NVIDIA's instructions, to add up with."""
    return u.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(u.device) >= (8, 0)
