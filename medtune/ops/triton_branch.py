"""MedMamba's scan branch from norm to projection as one operation, whose backward pass computes what others wait for first.

By PyTorch's operators the gradients of weights stand between those of activations, which the next block waits for: in the
small maps of the later stages a third of the time between two scans. Here they are computed on another stream, beside what
follows. Of activations, the gradients are written where they are read: no halves are put together, no sums of two made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medtune.ops import triton_depthwise, triton_norm, triton_scan
from medtune.ops.branch_weights import Parameters, Used, Weights, gradients, prepared
from medtune.ops.launch import dense_rows


class _Later:
    """What a branch's gradients of its weights are computed of, once the backward pass of its activations has been."""

    used: Used | None = None


class _Ticket(torch.autograd.Function):
    """Its backward pass is that of a branch's weights, which autograd runs on the stream that this was called on."""

    @staticmethod
    def forward(ctx: Any, later: _Later, *parameters: Tensor) -> Tensor:
        ctx.later = later
        ctx.save_for_backward(*parameters)
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        used, ctx.later.used = ctx.later.used, None
        found = gradients(Parameters(*ctx.saved_tensors), used)
        if used.u.is_cuda:  # Memory is given out anew in the order of its own stream: not before this one is through, too.
            for x in used:
                x.record_stream(torch.cuda.current_stream(x.device))
        return None, *found


class Ready(NamedTuple):
    """A branch's weights for one pass, made on any stream before the branch runs."""

    weights: Weights
    ticket: Tensor
    later: _Later
    scale: Tensor | None
    """(B,): of each image's result, for who adds it."""


def ready(parameters: Parameters, dtype: torch.dtype, scale: Tensor | None) -> Ready:
    """For activations of a dtype. The stream that is current here computes the gradients of weights."""
    later = _Later()
    return Ready(prepared(parameters, dtype), _Ticket.apply(later, *parameters), later, scale)


def triton_scan_branch(x: Tensor, given: Ready, eps: float) -> Tensor:
    """A map (B, H, W, C), channels side by side, to the same in the weights' dtype; eps: of both norms."""
    if not (torch.is_grad_enabled() and (x.requires_grad or given.ticket.requires_grad)):
        return _forward(x, given.weights, eps, keep=False)[0]
    return _Branch.apply(x, given.ticket, given.later, given.weights, eps)


def _forward(x: Tensor, weights: Weights, eps: float, keep: bool) -> tuple[Tensor, ...]:
    """The result, and what the backward pass reads besides x."""
    maps, dtype = x.shape[:3], weights.in_proj.dtype
    h = x.new_empty(x.shape, dtype=dtype)
    triton_norm.launch_forward(x, None, weights.norm, weights.norm_bias, h, eps)
    both = (_rows(h) @ weights.in_proj.mT).view(*maps, -1)
    left, gate = both.chunk(2, dim=-1)
    u = left.new_empty(left.shape)
    triton_depthwise.launch_forward(left, weights.taps, weights.taps_bias, u)
    given = (_rows(u) @ weights.x_proj.flatten(0, 1).mT).view(-1, *weights.x_proj.shape[:2])
    steps, mix = _steps_and_mix(given, weights)
    delta = torch.bmm(steps, weights.dt_proj.mT)  # (4, B H W, D)
    scanned = weights.decay, weights.skip, weights.step_bias
    y, states, mixed = triton_scan.launch_map(u, _of_images(delta, u, 1), _of_images(mix, u, 0), *scanned, True, keep)
    gated = y.new_empty(y.shape)
    triton_norm.launch_forward(y, gate, weights.out_norm, weights.out_norm_bias, gated, eps)
    out = (_rows(gated) @ weights.out_proj.mT).view(*maps, -1)
    return out, h, both, u, given, delta, states, mixed, y, gated


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
        x, ticket, h, both, u, given, delta, states, mixed, y, gated, *last = ctx.saved_tensors
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
        dgiven, ddelta = torch.empty_like(given), torch.empty_like(delta)
        dsteps, dmix = _steps_and_mix(dgiven, weights)
        du, scans = triton_scan.launch_map_backward(
            u, _of_images(delta, u, 1), *scanned, states, mixed, dy, True, _of_images(ddelta, u, 1), _of_images(dmix, u, 0)
        )
        torch.bmm(ddelta, weights.dt_proj, out=dsteps)
        _rows(du).addmm_(dgiven.flatten(1), weights.x_proj.flatten(0, 1))
        taps = triton_depthwise.launch_backward(left, weights.taps, weights.taps_bias, du, dleft)
        dh = (_rows(dboth) @ weights.in_proj).view_as(h)
        dx = torch.empty_like(x)
        norm = triton_norm.launch_backward(x, None, weights.norm, weights.norm_bias, dh, dx, None, ctx.eps)
        if ctx.needs_input_grad[1]:
            ctx.later.used = Used(
                norm, dboth, h, taps, dgiven, u, given, ddelta, scans, out_norm, dout, gated, weights.decay
            )
        return dx, torch.empty_like(ticket), None, None, None


def _steps_and_mix(given: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """What steps are made of, (4, B H W, R), and B over C, (B H W, 4, 2 N), of both side by side."""
    rank = weights.dt_proj.shape[2]
    return given[..., :rank].transpose(0, 1), given[..., rank:]


def _of_images(x: Tensor, u: Tensor, dim: int) -> Tensor:
    """With an axis of images and one of positions for that of both."""
    return x.unflatten(dim, (len(u), -1))


def _rows(x: Tensor) -> Tensor:
    """(B, H, W, D) -> (B H W, D)."""
    return x.flatten(0, 2)
