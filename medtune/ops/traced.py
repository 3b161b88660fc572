"""The selective scan as a graph of plain operations, for `torch.export`: any batch, no code of ours needed to run it.

The sequence is cut into about sqrt(L) lanes that run side by side, as in `chunks.py`: first each lane's own last state, then
the states that enter the lanes, then the lanes themselves. Log-depth doubling makes a smaller graph, but computes
each state log2(L) times.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medtune.ops.chunks import LOG2_E

LEAST = -100.0
"""Exponent of 2 below which a decay counts as so much: nothing is left, and smaller numbers are slow to compute with."""


def traced_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """u, delta: (G, batch, L, d); A: (G, N, d); B, C: (G, batch, L, N). Returns sum_n C h, (G, batch, L, d)."""
    length = u.shape[2]
    rows = math.ceil(math.sqrt(length))
    lanes = -(-length // rows)
    u, delta, B, C = (F.pad(v, (0, 0, 0, lanes * rows - length)).unflatten(2, (lanes, rows)) for v in (u, delta, B, C))
    exponents = delta.unsqueeze(-2) * (A * LOG2_E)[:, None, None, None]  # (G, batch, lanes, rows, N, d)
    decays = torch.exp2(exponents.clamp(min=LEAST)).unbind(3)
    inputs = ((delta * u).unsqueeze(-2) * B.unsqueeze(-1)).unbind(3)
    state = inputs[0]
    for decay, added in zip(decays[1:], inputs[1:], strict=True):
        state = decay * state + added
    state = _entering(state, torch.exp2(exponents.sum(3).clamp(min=LEAST)))
    outputs = []
    for decay, added, read in zip(decays, inputs, C.unbind(3), strict=True):
        state = decay * state + added
        outputs.append((read.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, dim=3).flatten(2, 3)[:, :, :length]


def _entering(last: Tensor, through: Tensor) -> Tensor:
    """What enters each lane, from every lane's own last state and what a whole lane lets through (G, batch, lanes, N, d)."""
    entering = [torch.zeros_like(last[:, :, 0])]
    for own, decay in zip(last.unbind(2)[:-1], through.unbind(2)[:-1], strict=True):
        entering.append(decay * entering[-1] + own)
    return torch.stack(entering, dim=2)
