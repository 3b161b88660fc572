"""Selective scan, the recurrence of Mamba (Gu & Dao 2023, arXiv:2312.00752), forward and backward.

For every channel d with states n, over positions t:
    h_t = exp(delta_t A_dn) h_{t-1} + delta_t B_tn u_t,    y_t = sum_n C_tn h_t + D_d u_t

One function, two ways: mamba-ssm's CUDA kernel where it is installed, else the PyTorch below on any device. The states,
N times the input, are never all kept: the sequence is cut into chunks, the forward pass keeps the state that enters
each chunk, the backward pass computes a chunk's states again. Within a chunk a step is one in-place multiply-add.
Chunks can also run side by side ("lanes"): first each lane's own last state, then the states that enter the lanes, then
the lanes themselves; on a GPU this makes about 3 sqrt(L) steps of L. Decays are only ever multiplied, so any positive
delta is safe. The arithmetic is in float32 (float64 for float64 inputs), under autocast too.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = 1 / math.log(2)


class Plan(NamedTuple):
    """How the work is cut: images at a time, positions in a chunk, chunks side by side."""

    images: int
    rows: int
    lanes: int


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
    shape, dtype = u.shape, u.dtype
    batch, groups, length = B.shape[0], B.shape[1], B.shape[3]
    kernel = _cuda_kernel() if u.is_cuda and dtype != torch.float64 else None
    if kernel is not None:
        flat = (batch, A.shape[0], length)
        u32, delta32, A32, B32, C32 = (x.float() for x in (u.reshape(flat), delta.reshape(flat), A, B, C))
        bias32, D32 = (None if x is None else x.float() for x in (delta_bias, D))
        y = kernel(u32, delta32, A32, B32, C32, D32, None, bias32, delta_softplus)
        return y.reshape(shape).to(dtype)
    with torch.autocast(u.device.type, enabled=False):
        work = torch.float64 if dtype == torch.float64 else torch.float32
        u, delta = (x.to(work).reshape(batch, groups, -1, length).permute(1, 0, 3, 2) for x in (u, delta))
        B, C = (x.to(work).permute(1, 0, 3, 2) for x in (B, C))  # (G, batch, L, N); u, delta: (G, batch, L, d)
        A = A.to(work).unflatten(0, (groups, -1)).transpose(1, 2)  # (G, N, d)
        if delta_bias is not None:
            delta = delta + delta_bias.to(work).view(groups, 1, 1, -1)
        if delta_softplus:
            delta = F.softplus(delta)
        x = delta * u
        y = _Step.apply(x, delta, A, B, C) if length == 1 else _scan(x, delta, A, B, C)
        if D is not None:
            y = torch.addcmul(y, D.to(work).view(groups, 1, 1, -1), u)
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


@functools.cache
def _cuda_kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's kernel, or None where the package is not installed."""
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError:
        return None
    return module.selective_scan_fn


def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    length = x.shape[2]
    cut = plan(x.device, x.shape[1], length, A.numel())
    if cut.lanes > 1:  # past the end: no decay, no input
        spare = -length % (cut.rows * cut.lanes)
        x, delta, B, C = (F.pad(v, (0, 0, 0, spare)) for v in (x, delta, B, C))
    return _Scan.apply(x, delta, A, B, C, cut)[:, :, :length]


def plan(device: torch.device, batch: int, length: int, state: int) -> Plan:
    """Cut the work so that a block's states stay in a CPU's cache, or fill a GPU in few steps.

    state: numbers in one image's state at one position.
    """
    if device.type == "cpu":
        images = max(1, min(batch, 49152 // state))
        rows = max(1, min(length, 524288 // (images * state)))
        return Plan(images, rows, 1)
    lanes = max(1, math.isqrt(length))
    images = max(1, min(batch, 2**26 // (length * state)))
    return Plan(images, -(-length // lanes), lanes)


class _Step(torch.autograd.Function):
    """The scan of one position: nothing decays, so no states are made. delta and A get zeros, not nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta, A, B, C)
        return x * (B * C).sum(-1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, delta, A, B, C = ctx.saved_tensors
        common = (dy * x).sum(-1, keepdim=True)
        dx = dy * (B * C).sum(-1, keepdim=True)
        return dx, torch.zeros_like(delta), torch.zeros_like(A), common * C, common * B


class _Scan(torch.autograd.Function):
    """y_t = C_t . h_t with h_t = exp(delta_t A) h_{t-1} + B_t x_t.

    x, delta: (G, batch, L, d); A: (G, N, d); B, C: (G, batch, L, N). L is a multiple of rows * lanes when lanes > 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, cut: Plan) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        decay, state = _buffers(x, A, cut, 2)
        A2 = A * LOG2_E
        entering = []
        for images in _slices(x.shape[1], cut.images):
            enter = None
            for rows in _slices(x.shape[2], cut.rows * cut.lanes):
                at = (slice(None), images, rows)
                block = _Block(x[at], delta[at], A2, B[at], C[at], cut.lanes, decay, state)
                entering.append(block.run(enter))
                enter = block.state[:, :, -1, -1].clone()
                y[at] = torch.matmul(block.C.unsqueeze(-2), block.state).view_as(y[at])
        ctx.save_for_backward(x, delta, A, B, C)
        ctx.cut, ctx.entering = cut, entering
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C = ctx.saved_tensors
        cut, entering = ctx.cut, list(ctx.entering)
        dx, ddelta, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, delta, B, C))
        dA = torch.zeros_like(A)
        decay, state, grad = _buffers(x, A, cut, 3)
        A2 = A * LOG2_E
        with torch.autocast(x.device.type, enabled=False):
            for images in reversed(_slices(x.shape[1], cut.images)):
                leave = None
                for rows in reversed(_slices(x.shape[2], cut.rows * cut.lanes)):
                    at = (slice(None), images, rows)
                    block = _Block(x[at], delta[at], A2, B[at], C[at], cut.lanes, decay, state)
                    block.run_again(entering.pop())
                    dy_block = block.lanes(dy[at])
                    dC[at] = torch.matmul(dy_block.unsqueeze(-2), block.state.mT).view_as(dC[at])
                    leave = block.run_back(dy_block, leave, grad)
                    dB[at] = torch.matmul(block.x.unsqueeze(-2), block.grad.mT).view_as(dB[at])
                    dx[at] = torch.matmul(block.B.unsqueeze(-2), block.grad).view_as(dx[at])
                    block.decay_grads(A, ddelta[at], dA)
        return dx, ddelta, dA, dB, dC, None


def _slices(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def _buffers(x: Tensor, A: Tensor, cut: Plan, count: int) -> list[Tensor]:
    """Room for the states of the largest block, flat, `count` times."""
    size = min(cut.images, x.shape[1]) * min(cut.rows * cut.lanes, x.shape[2]) * A.numel()
    return [x.new_empty(size) for _ in range(count)]


class _Block:
    """Some images' positions: inputs as (G, b, lanes, rows, .), states as (G, b, lanes, rows, N, d)."""

    def __init__(
        self, x: Tensor, delta: Tensor, A2: Tensor, B: Tensor, C: Tensor, lanes: int, decay: Tensor, state: Tensor
    ) -> None:
        self.count = lanes
        self.x, self.delta, self.B, self.C = (self.lanes(v) for v in (x, delta, B, C))
        self.A2 = A2[:, None, None, None]
        self.shape = (*self.delta.shape[:-1], *A2.shape[1:])
        self.decay, self.state = (v[: math.prod(self.shape)].view(self.shape) for v in (decay, state))

    def lanes(self, v: Tensor) -> Tensor:
        return v.unflatten(2, (self.count, -1))

    def _decays_and_inputs(self, first: int) -> None:
        """Rows before `first` are not needed: no state enters them."""
        torch.mul(self.delta[:, :, :, first:].unsqueeze(-2), self.A2, out=self.decay[:, :, :, first:])
        self.decay[:, :, :, first:].exp2_()
        torch.mul(self.x.unsqueeze(-2), self.B.unsqueeze(-1), out=self.state)

    def _lane_decay(self) -> Tensor:
        """What a whole lane lets through: (G, b, lanes, N, d)."""
        return torch.exp2(self.delta.sum(3).unsqueeze(-2) * self.A2[:, :, :, 0])

    def run(self, enter: Tensor | None) -> Tensor | None:
        """Fill the states from the one that enters the block; returns what enters each lane (G, b, lanes, N, d)."""
        alone = enter is None and self.count == 1
        self._decays_and_inputs(1 if alone else 0)
        entering = None if enter is None else enter.unsqueeze(2)
        if self.count > 1:
            last = _step_through(self.state, self.decay)
            entering = _carry(enter, last, self._lane_decay())
        self._fill(entering)
        return entering

    def run_again(self, entering: Tensor | None) -> None:
        """As `run`, from what it returned."""
        self._decays_and_inputs(1 if entering is None else 0)
        self._fill(entering)
        self.entering = entering

    def _fill(self, entering: Tensor | None) -> None:
        states, decays = self.state.unbind(3), self.decay.unbind(3)
        if entering is not None:
            states[0].addcmul_(decays[0], entering)
        for before, here, decay in zip(states, states[1:], decays[1:], strict=False):
            here.addcmul_(decay, before)

    def run_back(self, dy: Tensor, leave: Tensor | None, room: Tensor) -> Tensor | None:
        """Fill the states' gradients; `leave` comes from the next block, what is returned goes to the one before."""
        self.grad = room[: math.prod(self.shape)].view(self.shape)
        torch.mul(dy.unsqueeze(-2), self.C.unsqueeze(-1), out=self.grad)
        leaving = None if leave is None else leave.unsqueeze(2)
        if self.count > 1:
            first = _step_through(self.grad.flip(3), self.decay.roll(-1, 3).flip(3))
            last = self.decay[:, :, :, 0] * first
            leaving = _carry(leave, last.flip(2), self._lane_decay().flip(2)).flip(2)
        grads, decays = self.grad.unbind(3), self.decay.unbind(3)
        if leaving is not None:
            grads[-1].add_(leaving)
        for t in range(len(grads) - 1, 0, -1):
            grads[t - 1].addcmul_(decays[t], grads[t])
        return None if self.entering is None else decays[0][:, :, 0] * grads[0][:, :, 0]

    def decay_grads(self, A: Tensor, ddelta: Tensor, dA: Tensor) -> None:
        """Write delta's gradient and add to A's; uses up decay and state."""
        first = 1 if self.entering is None else 0
        q = self.decay[:, :, :, first:].mul_(self.grad[:, :, :, first:])  # becomes d loss / d (delta A)
        q[:, :, :, 1 - first :].mul_(self.state[:, :, :, :-1])
        if self.entering is not None:
            q[:, :, :, 0].mul_(self.entering)
        else:
            self.lanes(ddelta)[:, :, :, 0] = 0
        scaled = torch.mul(q, A[:, None, None, None], out=self.state[:, :, :, first:])
        self.lanes(ddelta)[:, :, :, first:] = scaled.sum(-2)
        dA.add_(q.mul_(self.delta[:, :, :, first:].unsqueeze(-2)).sum((1, 2, 3)))


def _step_through(inputs: Tensor, decays: Tensor) -> Tensor:
    """Last state of every lane that starts from nothing."""
    state, *rest = inputs.unbind(3)
    state = state.clone()
    for here, decay in zip(rest, decays.unbind(3)[1:], strict=True):
        torch.addcmul(here, decay, state, out=state)
    return state


def _carry(enter: Tensor | None, last: Tensor, decay: Tensor) -> Tensor:
    """What enters each lane, from what enters the first and every lane's own last state and decay."""
    entering = torch.zeros_like(last)
    if enter is not None:
        entering[:, :, 0] = enter
    for lane in range(1, last.shape[2]):
        torch.addcmul(last[:, :, lane - 1], decay[:, :, lane - 1], entering[:, :, lane - 1], out=entering[:, :, lane])
    return entering
