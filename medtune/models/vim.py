"""Vim (Zhu et al. 2024, arXiv:2401.09417), bidirectional Mamba over patches, written from the paper and its figures.

Source:     https://github.com/hustvl/Vim; parameter names are the released ones, so its checkpoints (224 px) load
Deviations: from the released model, which takes 224x224 alone: sides that are no multiple of 16 are padded with zeros
            at the right and bottom, and positions of another grid than 14x14 are interpolated (bicubic).
            A layer adds its own result to the residual, not the next layer's doing: the same sums.
Tokens are (B, L, C).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.models.layers import DropPath, drop_rates, parameters_ending, reset_scan, scan_directions
from medtune.ops.causal_conv import causal_conv1d
from medtune.ops.conv import PatchConv

EPS = 1e-5
PATCH = 16
GRID = 14
"""Patches a side that positions are learned for."""


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, H / 16, W / 16, width), sides rounded up."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = PatchConv(in_channels, width, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.pad(x, (0, -x.shape[3] % PATCH, 0, -x.shape[2] % PATCH)))


class Mixer(nn.Module):
    """A Mamba block that scans the tokens forwards and backwards, gates both and takes half their sum."""

    def __init__(self, width: int, states: int = 16, taps: int = 4) -> None:
        super().__init__()
        inner, rank = 2 * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d, self.conv1d_b = (nn.Conv1d(inner, inner, taps, groups=inner) for _ in range(2))
        self.x_proj, self.x_proj_b = (nn.Linear(inner, rank + 2 * states, bias=False) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (nn.Linear(rank, inner) for _ in range(2))
        self.A_log, self.A_b_log = (nn.Parameter(torch.empty(inner, states)) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.empty(inner)) for _ in range(2))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def scanned(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The parameters of either scan, in the order `scan_directions` takes them."""
        ahead = self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D
        back = self.x_proj_b.weight, self.dt_proj_b.weight, self.dt_proj_b.bias, self.A_b_log, self.D_b
        return ahead, back

    def forward(self, tokens: Tensor) -> Tensor:
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        u = torch.stack((_convolve(x, self.conv1d), _convolve(x.flip(1), self.conv1d_b)))  # (2, B, L, D)
        x_proj, dt_proj, bias, a_log, skip = (torch.stack(pair) for pair in zip(*self.scanned(), strict=True))
        ahead, back = scan_directions(u, x_proj, dt_proj, bias, a_log.flatten(0, 1), skip.flatten())
        return self.out_proj((ahead + back.flip(1)) * F.silu(z) / 2)


def _convolve(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """(B, L, D) -> (B, L, D)."""
    return causal_conv1d(x.transpose(1, 2), conv.weight.squeeze(1), conv.bias, activation="silu").transpose(1, 2)


class Layer(nn.Module):
    """residual (B, L, C) -> residual, in float32 whatever the mixer computes in."""

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.mixer = Mixer(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, residual: Tensor) -> Tensor:
        return residual + self.drop_path(self.mixer(self.norm(residual)))


class Vim(nn.Module):
    """images (B, C, H, W), any size from 28 up -> logits (B, num_classes)."""

    def __init__(
        self, width: int, layers: int = 24, num_classes: int = 2, in_channels: int = 3, drop_path: float = 0.1
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, GRID**2 + 1, width))
        self.patch_embed = PatchEmbed(in_channels, width)
        self.layers = nn.ModuleList(Layer(width, rate) for rate in drop_rates(drop_path, layers))
        self.norm_f = nn.RMSNorm(width, eps=EPS)
        self.head = nn.Linear(width, num_classes)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        self.apply(functools.partial(_reset, layers=layers))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay."""
        kept = ("cls_token", "pos_embed", ".A_log", ".A_b_log", ".D", ".D_b")
        return parameters_ending(self, kept)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        height, width = patches.shape[1:3]
        middle = height * width // 2
        patches = patches.flatten(1, 2)
        token = self.cls_token.expand(images.shape[0], -1, -1)
        residual = torch.cat((patches[:, :middle], token, patches[:, middle:]), dim=1)
        residual = residual + self.positions(height, width)  # float32 from here on, under autocast too
        for layer in self.layers:
            residual = layer(residual)
        return self.head(self.norm_f(residual[:, middle]))

    def positions(self, height: int, width: int) -> Tensor:
        """Positions for a grid of patches and the class token in their middle: (1, height * width + 1, C)."""
        if (height, width) == (GRID, GRID):
            return self.pos_embed
        half, now = GRID**2 // 2, height * width // 2
        before, token, after = self.pos_embed.split((half, 1, GRID**2 - half), dim=1)
        grid = torch.cat((before, after), dim=1).transpose(1, 2).unflatten(2, (GRID, GRID))
        grid = F.interpolate(grid, (height, width), mode="bicubic", antialias=True)
        patches = grid.flatten(2).transpose(1, 2)
        return torch.cat((patches[:, :now], token, patches[:, now:]), dim=1)


def _reset(module: nn.Module, layers: int) -> None:
    if isinstance(module, Mixer):
        for scan in module.scanned():
            reset_scan(*scan)
        with torch.no_grad():  # what the layers add to the residual does not grow with their number
            module.out_proj.weight.mul_(layers**-0.5)
    elif isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


BLOCKS = (Layer,)
"""What activation checkpointing computes again."""


def vim_tiny(num_classes: int, in_channels: int) -> Vim:
    return Vim(192, num_classes=num_classes, in_channels=in_channels)


def vim_small(num_classes: int, in_channels: int) -> Vim:
    return Vim(384, num_classes=num_classes, in_channels=in_channels)
