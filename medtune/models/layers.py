"""What several architectures share: stochastic depth, and the selective scan of a map along four paths.

Maps are (B, H, W, C).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.ops.engines import in_kernels
from medtune.ops.scan import selective_scan

DIRECTIONS = 4


def parameters_ending(model: nn.Module, endings: tuple[str, ...]) -> set[str]:
    """Names of a model's parameters that end so."""
    return {name for name, _ in model.named_parameters() if name.endswith(endings)}


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, drop a branch for single images."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.drops = drop_prob > 0
        self.keep: Tensor
        self.register_buffer("keep", torch.tensor(1.0 - drop_prob), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.drops):
            return x
        if torch.compiler.is_compiling():  # a number would be compiled in, and no two blocks share the code
            kept = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device) < self.keep
            return x * (kept / self.keep).to(x.dtype)
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def scale(self, images: int, device: torch.device) -> Tensor | None:
        """What each image's branch is multiplied with, (B,) in float32, for who does it; None: nothing to do."""
        if not (self.training and self.drops):
            return None
        keep = 1 - self.drop_prob
        return torch.empty(images, device=device).bernoulli_(keep).div_(keep)


def drop_rates(last: float, blocks: int) -> list[float]:
    """Stochastic depth of each block: 0 to `last`, linear. Real numbers also where models are built on the meta device."""
    return torch.linspace(0, last, blocks, device="cpu").tolist()


def to_directions(x: Tensor) -> Tensor:
    """Read the grid row by row, column by column, and both backwards: (B, H, W, D) -> (4, B, H * W, D)."""
    rows = x.flatten(1, 2)
    columns = x.transpose(1, 2).flatten(1, 2)
    return torch.stack((rows, columns, rows.flip(1), columns.flip(1)))


def from_directions(y: Tensor, height: int, width: int) -> Tensor:
    """Put the four readings back on the grid and add them up: (4, B, H * W, D) -> (B, H, W, D)."""
    rows, columns, rows_back, columns_back = y.unbind(0)
    rows, columns = rows + rows_back.flip(1), columns + columns_back.flip(1)
    return rows.unflatten(1, (height, width)) + columns.unflatten(1, (width, height)).transpose(1, 2)


def scan_directions(u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, a_log: Tensor, skip: Tensor) -> Tensor:
    """Selective scan of G readings, each with projections of its own, in float32 at least: (G, B, L, D) -> the same.

    x_proj: (G, R + 2 N, D), gives steps, B and C for each position; dt_proj: (G, D, R) and dt_bias: (G, D) make steps
    for each channel; a_log: (G D, N), the logarithm of how fast states decay; skip: (G D).
    """
    images, (rank, states) = u.shape[1], (dt_proj.shape[-1], a_log.shape[-1])
    per_position = torch.bmm(u.flatten(1, 2), x_proj.mT)  # (G, B * L, R + 2 N)
    step, b, c = per_position.split((rank, states, states), dim=-1)
    delta = torch.bmm(step, dt_proj.mT)  # (G, B * L, D)
    delta, b, c = (v.unflatten(1, (images, -1)) for v in (delta, b, c))
    if not in_kernels(u):  # which compute in float32 whatever comes
        u, delta, b, c = (_wide(v) for v in (u, delta, b, c))
    u, delta, b, c = (v.permute(1, 0, 3, 2) for v in (u, delta, b, c))  # (B, G, ., L)
    decay, skip, bias = -torch.exp(_wide(a_log)), _wide(skip), _wide(dt_bias).flatten()
    return selective_scan(u, delta, decay, b, c, skip, bias, delta_softplus=True).permute(1, 0, 3, 2)


def scan_map(x: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, a_log: Tensor, skip: Tensor) -> Tensor:
    """The four readings of a map (B, H, W, D), each scanned with parameters of its own as above, added up: the same shape.

    Where our kernels run, no reading is ever copied: they visit the map's positions in a reading's order.
    """
    if not in_kernels(x):
        return from_directions(scan_directions(to_directions(x), x_proj, dt_proj, dt_bias, a_log, skip), *x.shape[1:3])
    from medtune.ops.triton_scan import triton_scan_map

    channels, (rank, states) = x.shape[-1], (dt_proj.shape[-1], a_log.shape[-1])
    to_rank, to_mix = x_proj.split((rank, 2 * states), dim=1)
    with torch.autocast(x.device.type, enabled=False):
        # The steps' two projections as one: the ranks (3 to 24) make matrix products of awkward shapes, slow on GPUs.
        to_delta = torch.bmm(dt_proj, to_rank)  # (4, D, D)
        weight = torch.cat((to_delta.flatten(0, 1), to_mix.flatten(0, 1)))
    decay = -torch.exp(_wide(a_log)).view(DIRECTIONS, channels, states).mT
    return triton_scan_map(x, F.linear(x, weight), decay, skip.view(DIRECTIONS, -1), dt_bias, True)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def reset_scan(x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, a_log: Tensor, skip: Tensor) -> None:
    """Initial values of what belongs to a scan (shapes: the last axes above); steps start between 0.001 and 0.1."""
    x_proj.uniform_(-1, 1).mul_(x_proj.shape[-1] ** -0.5)
    dt_proj.uniform_(-1, 1).mul_(dt_proj.shape[-1] ** -0.5)
    step = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus gives the step back
    a_log.copy_(torch.arange(1, a_log.shape[-1] + 1).log().expand_as(a_log))
    skip.fill_(1)
