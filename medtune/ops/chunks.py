"""The selective scan in PyTorch: chunks whose states are computed again on the way back.

The states, N times the input, are never all kept: the sequence is cut into chunks, the forward pass keeps the state that
enters each chunk, the backward pass computes a chunk's states again. Within a chunk a step is one in-place multiply-add.
Chunks can also run side by side ("lanes"): first each lane's own last state, then the states that enter the lanes, then
the lanes themselves; on a GPU this makes about 3 sqrt(L) steps of L. Decays are only ever multiplied, so any positive
delta is safe. exp is taken as exp2: PyTorch's exp on a CPU is 20 times slower where the result underflows.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
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


class OneStep(torch.autograd.Function):
    """y = x (B . C). A gets a gradient of zeros, not none: it is a parameter like the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, C)
        return x * (B * C).sum(-1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, A, B, C = ctx.saved_tensors
        common = (dy * x).sum(-1, keepdim=True)
        return dy * (B * C).sum(-1, keepdim=True), torch.zeros_like(A), common * C, common * B


class ChunkedScan(torch.autograd.Function):
    """u, delta: (G, batch, L, d); A: (G, N, d); B, C: (G, batch, L, N); D, bias: (G, d).

    L is a multiple of rows * lanes when lanes > 1.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
        softplus: bool, cut: Plan,
    ) -> Tensor:  # fmt: skip
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        rooms = _Rooms(u, A, D, bias, softplus, cut, backward=False)
        entering: list[Tensor | None] = []
        for blocks in _blocks(cut, u, delta, B, C, y):
            enter = None
            for u_, delta_, B_, C_, y_ in blocks:
                room = rooms.get(u_)
                room.prepare(u_, delta_)
                entering.append(enter)
                room.run(B_, enter)
                enter = room.states[-1][-1].clone()
                out = torch.bmm(C_.reshape(-1, 1, C_.shape[-1]), room.flat_state).view(y_.shape)
                if D is None:
                    y_.copy_(out)
                else:
                    torch.addcmul(out, D.unsqueeze(1), u_, out=y_)
        # Saved through torch, which frees it after the backward pass; what enters the lanes is large, N / sqrt(L) times
        # the input, so it is computed again.
        ctx.save_for_backward(u, delta, A, B, C, D, bias, *entering)
        ctx.softplus, ctx.cut = softplus, cut
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, bias, *entering = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        du, ddelta, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (u, delta, B, C))
        with torch.autocast(u.device.type, enabled=False):
            rooms = _Rooms(u, A, D, bias, ctx.softplus, ctx.cut, backward=True)
            for blocks in reversed(_blocks(ctx.cut, u, delta, B, C, dy, du, ddelta, dB, dC)):
                leave = None
                for u_, delta_, B_, C_, dy_, du_, ddelta_, dB_, dC_ in reversed(blocks):
                    room = rooms.get(u_)
                    room.prepare(u_, delta_)
                    enter = room.run(B_, entering.pop())
                    leave = room.run_back(dy_, C_, leave, enter is not None)
                    rows_x, rows_dy, rows_B = (v.reshape(-1, 1, v.shape[-1]) for v in (room.x, dy_, B_))
                    dC_.copy_(torch.bmm(rows_dy, room.flat_state.mT).view(dC_.shape))
                    dB_.copy_(torch.bmm(rows_x, room.flat_grad.mT).view(dB_.shape))
                    dx = torch.bmm(rows_B, room.flat_grad).view(u_.shape)
                    torch.mul(dx, room.delta, out=du_)
                    if D is not None and rooms.dD is not None:
                        du_.addcmul_(D.unsqueeze(1), dy_)
                        rooms.dD.add_((dy_ * u_).sum((0, 1, 3)))
                    room.delta_grad(enter, dx.mul_(u_), ddelta_)
        return du, ddelta, rooms.dA, dB, dC, rooms.dD, rooms.dbias, None, None


def _blocks(cut: Plan, *tensors: Tensor) -> list[list[tuple[Tensor, ...]]]:
    """Cut (G, batch, L, .) into blocks (rows, lanes, G, b, .): a list over images of lists over positions."""
    out = []
    for images in zip(*(v.split(cut.images, 1) for v in tensors), strict=True):
        rows = zip(*(v.split(cut.rows * cut.lanes, 2) for v in images), strict=True)
        out.append([tuple(v.unflatten(2, (cut.lanes, -1)).permute(3, 2, 0, 1, 4) for v in block) for block in rows])
    return out


class _Rooms:
    """Working memory, shared by all blocks, with one set of views for every shape of block, and gradients to add to."""

    def __init__(
        self, u: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool, cut: Plan, backward: bool
    ) -> None:
        self.A, self.A2, self.softplus = A.unsqueeze(1), (A * LOG2_E).unsqueeze(1), softplus
        self.bias = None if bias is None else bias.unsqueeze(1)
        if backward:
            self.dA = torch.zeros_like(A)
            self.dD, self.dbias = (None if v is None else torch.zeros_like(v) for v in (D, bias))
        positions = min(cut.images, u.shape[1]) * min(cut.rows * cut.lanes, u.shape[2])
        self.wide = [u.new_empty(positions * A.numel()) for _ in range(3 if backward else 2)]
        self.narrow = [u.new_empty(positions * A.shape[0] * A.shape[2]) for _ in range(2)]
        self.views: dict[torch.Size, _Room] = {}

    def get(self, u: Tensor) -> _Room:
        """The room for a block of inputs (rows, lanes, G, b, d)."""
        if u.shape not in self.views:
            wide = [m[: u.numel() * self.A.shape[-2]].view(*u.shape[:-1], *self.A.shape[-2:]) for m in self.wide]
            # Weak: a cycle would keep the working memory, gigabytes on a GPU, until Python next looks for cycles.
            narrow = [m[: u.numel()].view(u.shape) for m in self.narrow]
            self.views[u.shape] = _Room(weakref.proxy(self), wide, narrow)
        return self.views[u.shape]


class _Room:
    """States (rows, lanes, G, b, N, d) of one block, their decays and, backward, their gradients."""

    def __init__(self, shared: _Rooms, wide: list[Tensor], narrow: list[Tensor]) -> None:
        self.shared, self.A2 = shared, shared.A2
        self.decay, self.state = wide[:2]
        self.lanes = self.decay.shape[1]
        self.decays, self.states = self.decay.unbind(0), self.state.unbind(0)
        self.flat_state = self.state.flatten(0, 3)
        if len(wide) == 3:
            self.grad = wide[2]
            self.grads = self.grad.unbind(0)
            self.flat_grad = self.grad.flatten(0, 3)
        self.raw, self.x = narrow

    def prepare(self, u: Tensor, raw: Tensor) -> None:
        """Step sizes, and inputs times step sizes."""
        if self.shared.bias is None:
            self.raw.copy_(raw)
        else:
            torch.add(raw, self.shared.bias, out=self.raw)
        self.delta = F.softplus(self.raw) if self.shared.softplus else self.raw
        torch.mul(self.delta, u, out=self.x)

    def _decays_and_inputs(self, B: Tensor, first: int) -> None:
        """A first row that nothing enters needs no decay."""
        decay = self.decay[first:]
        torch.mul(self.delta[first:].unsqueeze(-2), self.A2, out=decay)
        decay.exp2_()
        torch.mul(self.x.unsqueeze(-2), B.unsqueeze(-1), out=self.state)

    def _lane_decay(self) -> Tensor:
        """What a whole lane lets through: (lanes, G, b, N, d)."""
        return torch.exp2(self.delta.sum(0).unsqueeze(-2) * self.A2)

    def run(self, B: Tensor, enter: Tensor | None) -> Tensor | None:
        """Fill the states from the one that enters the block; returns what enters each lane (lanes, G, b, N, d)."""
        self._decays_and_inputs(B, int(enter is None and self.lanes == 1))
        entering = None if enter is None else enter.unsqueeze(0)
        if self.lanes > 1:
            entering = _carry(enter, _step_through(self.states, self.decays), self._lane_decay())
        self._fill(entering)
        return entering

    def _fill(self, entering: Tensor | None) -> None:
        before = self.states[0]
        if entering is not None:
            before.addcmul_(self.decays[0], entering)
        for here, decay in zip(self.states[1:], self.decays[1:], strict=True):
            before = here.addcmul_(decay, before)

    def run_back(self, dy: Tensor, C: Tensor, leave: Tensor | None, entered: bool) -> Tensor | None:
        """Fill the states' gradients; `leave` comes from the next block, what is returned goes to the one before."""
        torch.mul(dy.unsqueeze(-2), C.unsqueeze(-1), out=self.grad)
        leaving = None if leave is None else leave.unsqueeze(0)
        if self.lanes > 1:
            first = self.decays[0] * _step_through(self.grads[::-1], (*self.decays[:1], *self.decays[:0:-1]))
            leaving = _carry(leave, first.flip(0), self._lane_decay().flip(0)).flip(0)
        after = self.grads[-1]
        if leaving is not None:
            after.add_(leaving)
        for here, decay in zip(self.grads[-2::-1], self.decays[:0:-1], strict=True):
            after = here.addcmul_(decay, after)
        return self.decays[0][0] * after[0] if entered else None

    def delta_grad(self, entering: Tensor | None, ddelta: Tensor, out: Tensor) -> None:
        """Write the gradient of delta as it was given, from what reaches it through the inputs, and add to A's and the
        bias's. Uses up decay and state."""
        first = int(entering is None)
        if entering is not None:
            self.decays[0].mul_(entering)
        self.decay[1:].mul_(self.state[:-1])
        q = self.decay[first:].mul_(self.grad[first:])  # d loss / d (delta A)
        ddelta[first:] += torch.mul(q, self.shared.A, out=self.state[first:]).sum(-2)
        q.mul_(self.delta[first:].unsqueeze(-2))
        self.shared.dA.add_(q.flatten(0, 1).sum(0).sum(1))
        if self.shared.softplus:
            torch.mul(ddelta, self.raw.sigmoid_(), out=out)
        else:
            out.copy_(ddelta)
        if self.shared.dbias is not None:
            self.shared.dbias.add_(out.sum((0, 1, 3)))


def _step_through(inputs: Sequence[Tensor], decays: Sequence[Tensor]) -> Tensor:
    """Last state of every lane that starts from nothing."""
    state = inputs[0].clone()
    for here, decay in zip(inputs[1:], decays[1:], strict=True):
        torch.addcmul(here, decay, state, out=state)
    return state


def _carry(enter: Tensor | None, last: Tensor, decay: Tensor) -> Tensor:
    """What enters each lane, from what enters the first and every lane's own last state and decay."""
    entering = torch.zeros_like(last)
    if enter is not None:
        entering[0] = enter
    for lane in range(1, len(last)):
        torch.addcmul(last[lane - 1], decay[lane - 1], entering[lane - 1], out=entering[lane])
    return entering
