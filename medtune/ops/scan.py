"""Selective scan, the recurrence of Mamba (Gu & Dao 2023, arXiv:2312.00752), forward and backward.

For every channel d with states n, over positions t:
    h_t = exp(delta_t A_dn) h_{t-1} + delta_t B_tn u_t,    y_t = sum_n C_tn h_t + D_d u_t

One function, three ways (`engines.py` chooses): our Triton kernels, mamba-ssm's CUDA kernel, PyTorch on any device.
The arithmetic is in float32 (float64 for float64 inputs), under autocast too.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from medtune.ops.chunks import ChunkedScan, OneStep, Plan
from medtune.ops.engines import scan_engine
from medtune.ops.traced import traced_scan


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Scan `u` along its last axis; mamba-ssm's signature and meaning, for real numbers.

    u, delta: (batch, D, L), or (batch, G, D / G, L) to spare a caller with G groups the copy; A: (D, N), negative;
    B, C: (batch, G, N, L), or (batch, N, L) for one group, shared by a group's D / G channels; D, delta_bias: (D,).
    delta is what the bias is added to and softplus is taken of, when asked for. Returns y, shaped and typed like u.
    Raises ValueError when shapes do not fit. Strides are free; (G, batch, L, D / G) order in memory saves a copy.
    """
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    _check(u, delta, A, B, C, D, delta_bias)
    if u.is_meta:  # for what counts or checks shapes alone
        return torch.empty_like(u)
    shape, dtype = u.shape, u.dtype
    batch, groups, length = B.shape[0], B.shape[1], B.shape[3]
    engine = "torch" if dtype == torch.float64 else scan_engine(u.device)
    if engine == "mamba":
        return _by_kernel(_cuda_kernel(), u, delta, A, B, C, D, delta_bias, delta_softplus)
    if engine == "triton":
        return _by_triton(u, delta, A, B, C, D, delta_bias, delta_softplus)
    with torch.autocast(u.device.type, enabled=False):
        work = torch.float64 if dtype == torch.float64 else torch.float32
        u, delta = (x.to(work).reshape(batch, groups, -1, length).permute(1, 0, 3, 2) for x in (u, delta))
        u, delta = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, delta))  # (G, batch, L, d)
        B, C = (x.to(work).permute(1, 0, 3, 2).contiguous() for x in (B, C))  # (G, batch, L, N)
        A = A.to(work).unflatten(0, (groups, -1)).transpose(1, 2).contiguous()  # (G, N, d)
        D, bias = (None if x is None else x.to(work).view(groups, -1) for x in (D, delta_bias))
        scan = _one_step if length == 1 else _exported if torch.compiler.is_exporting() else _many_steps
        y = scan(u, delta, A, B, C, D, bias, delta_softplus)
    return y.permute(1, 0, 3, 2).reshape(shape).to(dtype)


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None) -> None:
    channels, states = A.shape if A.dim() == 2 else (0, 0)
    if u.dim() not in (3, 4) or channels == 0 or u.numel() != u.shape[0] * channels * u.shape[-1]:
        raise ValueError(f"u must be (batch, D, L) or (batch, G, D / G, L) and A (D, N), got {_s(u)} and {_s(A)}")
    if delta.shape != u.shape:
        raise ValueError(f"delta must be shaped like u, {_s(u)}, got {_s(delta)}")
    fits = (u.shape[0], B.shape[1], states, u.shape[-1])
    for name, x in (("B", B), ("C", C)):
        if x.shape != fits:
            raise ValueError(f"{name} must be (batch, G, N, L) = {fits} like u, A and B, got {_s(x)}")
    if channels % B.shape[1] or (u.dim() == 4 and u.shape[1] != B.shape[1]):
        raise ValueError(f"the groups of B, {B.shape[1]}, must divide u's channels evenly, got u {_s(u)}")
    for name, v in (("D", D), ("delta_bias", bias)):
        if v is not None and v.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), got {_s(v)}")


def _s(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _by_kernel(
    kernel: Callable[..., Tensor], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """Ask mamba-ssm's function, which knows (batch, D, L) only, in float32."""
    flat = (u.shape[0], A.shape[0], u.shape[-1])
    wide = [x.float() for x in (u.reshape(flat), delta.reshape(flat), A, B, C)]
    D, bias = (None if x is None else x.float() for x in (D, bias))
    return kernel(*wide, D, None, bias, softplus).reshape(u.shape).to(u.dtype)


@functools.cache
def _cuda_kernel() -> Callable[..., Tensor]:
    """mamba-ssm's kernel."""
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


def _by_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    """Ask our kernels, which want channels side by side in memory: (G, batch, L, d)."""
    from medtune.ops.triton_scan import triton_selective_scan

    batch, groups, _, length = B.shape
    shape = u.shape
    u, delta = (x.reshape(batch, groups, -1, length).permute(1, 0, 3, 2) for x in (u, delta))
    A, B, C = A.unflatten(0, (groups, -1)).transpose(1, 2), B.transpose(0, 1), C.transpose(0, 1)
    D, bias = (None if x is None else x.view(groups, -1) for x in (D, bias))
    return triton_selective_scan(u, delta, A, B, C, D, bias, softplus).permute(1, 0, 3, 2).reshape(shape)


def plan(device: torch.device, batch: int, length: int, state: int) -> Plan:
    """Cut the work: on a CPU into blocks that stay in its cache, on a GPU into few and large steps.

    state: numbers in one image's state at one position. The sizes were the fastest of those tried, on 1 and 2 cores
    (3 MB a tensor of states) and on an H200 (512 MB a tensor).
    """
    if device.type == "cpu":
        images = _even(batch, min(8, 196608 // state))
        return Plan(images, _even(length, 786432 // (images * state)), lanes=1)
    lanes = math.isqrt(length)
    return Plan(_even(batch, 2**27 // (length * state)), -(-length // lanes), lanes)


def _even(total: int, most: int) -> int:
    """The size of parts of at most `most` (at least 1) that cut `total` as evenly as can be."""
    parts = -(-total // max(1, most))
    return -(-total // parts)


def _one_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    """Nothing decays in one position, so no states are made."""
    delta = delta if bias is None else delta + bias[:, None, None]
    delta = F.softplus(delta) if softplus else delta
    y = OneStep.apply(delta * u, A, B, C)
    return y if D is None else torch.addcmul(y, D[:, None, None], u)


def _exported(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    """What the chunks are cut by is one batch's; a program is for any."""
    delta = delta if bias is None else delta + bias[:, None, None]
    delta = F.softplus(delta) if softplus else delta
    y = traced_scan(u, delta, A, B, C)
    return y if D is None else torch.addcmul(y, D[:, None, None], u)


def _many_steps(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
) -> Tensor:
    length = u.shape[2]
    cut = plan(u.device, u.shape[1], length, A.numel())
    spare = -length % (cut.rows * cut.lanes) if cut.lanes > 1 else 0
    if spare:  # positions past the end come last and are cut off again
        u, delta, B, C = (F.pad(v, (0, 0, 0, spare)) for v in (u, delta, B, C))
    return ChunkedScan.apply(u, delta, A, B, C, D, bias, softplus, cut)[:, :, :length]
