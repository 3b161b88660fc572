"""The weights of MedMamba's scan branch as its kernels read them (`triton_branch.py`), and the gradients back.

Not by autograd, which would make a dozen tiny kernels a branch of the turning round and putting together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medtune.ops.parts import add_parts

EIGHT = 8
"""Ranks are filled up to multiples of it with zeros: products of rows that are not of 16 bytes are slow on GPUs."""


class Parameters(NamedTuple):
    """As the model has them, C channels, D inside, N states, R the rank of steps."""

    norm: Tensor
    """(C,)."""
    norm_bias: Tensor
    """(C,)."""
    in_proj: Tensor
    """(2 D, C): what is convolved and scanned, then the gate."""
    conv: Tensor
    """(D, 1, 3, 3)."""
    conv_bias: Tensor
    """(D,)."""
    x_proj: Tensor
    """(4, R + 2 N, D): what steps are made of, then B over C, for each reading."""
    dt_proj: Tensor
    """(4, D, R)."""
    dt_bias: Tensor
    """(4, D)."""
    a_log: Tensor
    """(4 D, N)."""
    skip: Tensor
    """(4 D,)."""
    out_norm: Tensor
    """(D,)."""
    out_norm_bias: Tensor
    """(D,)."""
    out_proj: Tensor
    """(C, D)."""


class Weights(NamedTuple):
    """As the kernels read them: those of matrix products in the activations' dtype."""

    norm: Tensor
    norm_bias: Tensor
    in_proj: Tensor
    taps: Tensor
    """(9, D)."""
    taps_bias: Tensor
    x_proj: Tensor
    """(4, R + 2 N, D), R filled up."""
    dt_proj: Tensor
    """(4, D, R), R filled up."""
    step_bias: Tensor
    decay: Tensor
    """(4, N, D)."""
    skip: Tensor
    """(4, D)."""
    out_norm: Tensor
    out_norm_bias: Tensor
    out_proj: Tensor


class Used(NamedTuple):
    """What the gradients are computed of: activations (B, H, W, .) and their gradients, and parts to be added up."""

    norm: Tensor
    """(K, 2, C): the weight's, then the bias'."""
    dboth: Tensor
    h: Tensor
    taps: Tensor
    """(K, 10, D): the taps', then the bias'."""
    dgiven: Tensor
    """(B H W, 4, R + 2 N)."""
    u: Tensor
    given: Tensor
    """Like dgiven."""
    ddelta: Tensor
    """(4, B H W, D)."""
    scans: Tensor
    """(4, B, N + 2, D): the decay's, the skip's, the step's bias'."""
    out_norm: Tensor
    """(K, 2, D)."""
    dout: Tensor
    gated: Tensor
    decay: Tensor
    """(4, N, D)."""


@torch.no_grad()
def prepared(given: Parameters, dtype: torch.dtype) -> Weights:
    """The weights, products' in dtype."""
    readings, channels, rank = given.dt_proj.shape
    more = -rank % EIGHT
    x_proj = given.x_proj
    if more:
        to_rank, to_mix = x_proj.split((rank, x_proj.shape[1] - rank), dim=1)
        x_proj = torch.cat((to_rank, to_rank.new_zeros(readings, more, channels), to_mix), dim=1)
    return Weights(
        given.norm, given.norm_bias, given.in_proj.to(dtype), given.conv.flatten(1).mT.contiguous(), given.conv_bias,
        x_proj.to(dtype), F.pad(given.dt_proj, (0, more)).to(dtype), given.dt_bias,
        -torch.exp(given.a_log).unflatten(0, (readings, channels)).mT.contiguous(), given.skip.view(readings, channels),
        given.out_norm, given.out_norm_bias, given.out_proj.to(dtype),
    )  # fmt: skip


@torch.no_grad()
def gradients(of: Parameters, used: Used) -> Parameters:
    """Of the parameters, in float32 where a GPU's matrix products of smaller types can give it."""
    norm, taps, out_norm = (add_parts(parts[None])[0] for parts in (used.norm, used.taps, used.out_norm))
    scans = add_parts(used.scans)
    readings, channels, rank = of.dt_proj.shape
    states = scans.shape[1] - 2
    x_proj = _product(used.dgiven.flatten(1), _rows(used.u)).view(*used.dgiven.shape[1:], channels)
    if x_proj.shape[1] > of.x_proj.shape[1]:
        x_proj = torch.cat((x_proj[:, :rank], x_proj[:, -2 * states :]), dim=1)
    a_log = scans.new_empty(readings, channels, states)
    torch.mul(scans[:, :states].mT, used.decay.mT, out=a_log)  # of -exp(a): itself
    return Parameters(
        norm[0], norm[1], _product(_rows(used.dboth), _rows(used.h)), taps[:9].mT.reshape(of.conv.shape), taps[9],
        x_proj, _of_dt_proj(used, states)[..., :rank], scans[:, states + 1], a_log.flatten(0, 1),
        scans[:, states].flatten(), out_norm[0], out_norm[1], _product(_rows(used.dout), _rows(used.gated)),
    )  # fmt: skip


def _of_dt_proj(used: Used, states: int) -> Tensor:
    """Image by image, then added up: of few channels and ranks, a product of all positions would be few programs' work."""
    readings, images, _, channels = used.scans.shape
    rank = used.given.shape[2] - 2 * states
    steps = used.given[..., :rank].transpose(0, 1).reshape(readings * images, -1, rank)
    each = torch.bmm(used.ddelta.view(len(steps), -1, channels).mT, steps)  # (4 B, D, R)
    return each.view(readings, images, channels, rank).sum(1, dtype=torch.float32)


def _product(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient (K, C) of a product's weights, of dy (rows, K) and x (rows, C)."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(dy.mT, x, out_dtype=torch.float32)
    return dy.mT @ x


def _rows(x: Tensor) -> Tensor:
    """(B, H, W, D) -> (B H W, D)."""
    return x.flatten(0, 2)
