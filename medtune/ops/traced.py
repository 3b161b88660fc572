"""The selective scan as a small graph of plain operations, for `torch.export`: any batch, no code of ours needed to run it.

Doubling (Hillis & Steele 1986): after k steps each position has what the 2^k before it give, so log2(L) steps do, at the
cost of all states in memory at once. Decays are only ever multiplied, so any positive delta is safe.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def traced_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """u, delta: (G, batch, L, d); A: (G, N, d); B, C: (G, batch, L, N). Returns sum_n C h, (G, batch, L, d)."""
    length = u.shape[2]
    decay = torch.exp(delta.unsqueeze(-2) * A[:, None, None])  # (G, batch, L, N, d)
    state = (delta * u).unsqueeze(-2) * B.unsqueeze(-1)
    reach = 1
    while reach < length:
        state = state + decay * _later(state, reach)
        decay = decay * _later(decay, reach)
        reach *= 2
    return (C.unsqueeze(-2) @ state).squeeze(-2)


def _later(x: Tensor, steps: int) -> Tensor:
    """(G, batch, L, N, d) moved on along L, zeros coming in: nothing enters from before the first position."""
    return F.pad(x[:, :, :-steps], (0, 0, 0, 0, steps, 0))
