"""MedMamba's scan branch from norm to projection as one operation, whose backward pass computes what others wait for first.

By PyTorch's operators the gradients of weights stand between those of activations, which the next block waits for: in the
small maps of the later stages a third of the time between two scans. Here they are computed on another stream, beside what
follows. Of activations, the gradients are written where they are read: no halves are put together, no sums of two made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medtune.ops import triton_depthwise, triton_norm, triton_scan
from medtune.ops.launch import dense_rows
from medtune.ops.parts import add_parts


class Weights(NamedTuple):
    """As the kernels read them: in float32, but the products', which are in the activations' dtype."""

    norm: Tensor
    """(C,)."""
    norm_bias: Tensor
    """(C,)."""
    in_proj: Tensor
    """(2 D, C): what is convolved and scanned, then the gate."""
    taps: Tensor
    """(9, D)."""
    taps_bias: Tensor
    """(D,)."""
    project: Tensor
    """(4 D + 4 * 2 N, D): a position's steps, then B over C, for each reading."""
    decay: Tensor
    """(4, N, D)."""
    skip: Tensor
    """(4, D)."""
    step_bias: Tensor
    """(4, D)."""
    out_norm: Tensor
    """(D,)."""
    out_norm_bias: Tensor
    """(D,)."""
    out_proj: Tensor
    """(C, D)."""


class _Later:
    """How to compute a branch's gradients of its weights, once the backward pass of its activations has been."""

    def __init__(self) -> None:
        self.gradients: Callable[[], Weights] | None = None
        self.used: tuple[Tensor, ...] = ()

    def settle(self) -> Weights:
        """Compute them, on the current stream, and let go of what they were computed of."""
        assert self.gradients is not None, "the branch's backward pass comes first"
        gradients, used = self.gradients(), self.used
        if used[0].is_cuda:
            stream = torch.cuda.current_stream(used[0].device)
            for x in used:
                x.record_stream(stream)
        self.gradients, self.used = None, ()
        return gradients


class _Ticket(torch.autograd.Function):
    """Its backward pass gives the gradients of a branch's weights, on the stream that this was called on, by autograd."""

    @staticmethod
    def forward(ctx: Any, later: _Later, *weights: Tensor) -> Tensor:
        ctx.later = later
        return weights[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.later.settle()


class Ready(NamedTuple):
    """A branch's weights for one pass, made on any stream before the branch runs."""

    weights: Weights
    ticket: Tensor
    later: _Later
    scale: Tensor | None
    """(B,): of each image's result, for who adds it."""


def ready(weights: Weights, scale: Tensor | None) -> Ready:
    """What `triton_scan_branch` takes; the gradients of weights are computed on the stream that is current here."""
    later = _Later()
    return Ready(weights, _Ticket.apply(later, *weights), later, scale)


def triton_scan_branch(x: Tensor, given: Ready, eps: float) -> Tensor:
    """A map (B, H, W, C), channels side by side, to the same in the weights' dtype; eps: of both norms."""
    weights = Weights(*(w.detach() for w in given.weights))
    if not (torch.is_grad_enabled() and (x.requires_grad or given.ticket.requires_grad)):
        return _forward(x, weights, eps, keep=False)[0]
    return _Branch.apply(x, given.ticket, given.later, weights, eps)


def _forward(x: Tensor, weights: Weights, eps: float, keep: bool) -> tuple[Tensor, ...]:
    """The result, and what the backward pass reads besides x."""
    maps, dtype = x.shape[:3], weights.in_proj.dtype
    h = x.new_empty(x.shape, dtype=dtype)
    triton_norm.launch_forward(x, None, weights.norm, weights.norm_bias, h, eps)
    both = (_rows(h) @ weights.in_proj.mT).view(*maps, -1)
    left, gate = both.chunk(2, dim=-1)
    u = left.new_empty(left.shape)
    triton_depthwise.launch_forward(left, weights.taps, weights.taps_bias, u)
    projected = (_rows(u) @ weights.project.mT).view(*maps, -1)
    scanned = weights.decay, weights.skip, weights.step_bias
    y, states, mixed = triton_scan.launch_map(u, projected, *scanned, True, keep)
    gated = y.new_empty(y.shape)
    triton_norm.launch_forward(y, gate, weights.out_norm, weights.out_norm_bias, gated, eps)
    out = (_rows(gated) @ weights.out_proj.mT).view(*maps, -1)
    return out, h, both, u, projected, states, mixed, y, gated


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ticket: Tensor, later: _Later, weights: Weights, eps: float) -> Tensor:
        out, *kept = _forward(x, weights, eps, keep=True)
        ctx.later, ctx.eps = later, eps
        ctx.save_for_backward(x, ticket, *kept, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        # Asked for once: activation checkpointing computes them anew at each look.
        x, ticket, h, both, u, projected, states, mixed, y, gated, *last = ctx.saved_tensors
        weights = Weights(*last)
        dout = dense_rows(dout)
        left, gate = both.chunk(2, dim=-1)
        dboth = torch.empty_like(both)
        dleft, dgate = dboth.chunk(2, dim=-1)
        dgated = (_rows(dout) @ weights.out_proj).view_as(gated)
        dy = torch.empty_like(y)
        out_norm = triton_norm.launch_backward(
            y, gate, weights.out_norm, weights.out_norm_bias, dgated, dy, dgate, ctx.eps
        )
        scanned = weights.decay, weights.skip, weights.step_bias
        du, dprojected, scans = triton_scan.launch_map_backward(u, projected, *scanned, states, mixed, dy, True)
        _rows(du).addmm_(_rows(dprojected), weights.project)
        taps = triton_depthwise.launch_backward(left, weights.taps, weights.taps_bias, du, dleft)
        dh = (_rows(dboth) @ weights.in_proj).view_as(h)
        dx = torch.empty_like(x)
        norm = triton_norm.launch_backward(x, None, weights.norm, weights.norm_bias, dh, dx, None, ctx.eps)
        if ctx.needs_input_grad[1]:
            ctx.later.used = used = norm, dboth, h, taps, dprojected, u, scans, out_norm, dout, gated
            ctx.later.gradients = functools.partial(_of_weights, *used)
        return dx, torch.empty_like(ticket), None, None, None


def _of_weights(
    norm: Tensor, dboth: Tensor, h: Tensor, taps: Tensor, dprojected: Tensor, u: Tensor, scans: Tensor, out_norm: Tensor,
    dout: Tensor, gated: Tensor,
) -> Weights:  # fmt: skip
    """The gradients; norm, taps, scans and out_norm are parts, to be added up."""
    dnorm, dtaps, dout_norm = (add_parts(parts[None])[0] for parts in (norm, taps, out_norm))
    dscans = add_parts(scans)
    in_proj, project, out_proj = (_rows(d).mT @ _rows(x) for d, x in ((dboth, h), (dprojected, u), (dout, gated)))
    return Weights(
        norm=dnorm[0], norm_bias=dnorm[1], in_proj=in_proj, taps=dtaps[:9], taps_bias=dtaps[9],
        project=project, decay=dscans[:, :-2], skip=dscans[:, -2], step_bias=dscans[:, -1],
        out_norm=dout_norm[0], out_norm_bias=dout_norm[1], out_proj=out_proj,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """(B, H, W, D) -> (B H W, D)."""
    return x.flatten(0, 2)
