"""VMamba (Liu et al. 2024, arXiv:2401.10166), the released second version, written from its description.

Source:     https://github.com/MzeroMiko/VMamba; parameter names are the released ones, so its checkpoints load
Deviations: none in the values; maps are (B, H, W, C) inside, where the released model is channels first. Convolutions
            of stride 2 are padded, so every size runs, down to maps of 1x1.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medtune.models.layers import (
    DIRECTIONS,
    DropPath,
    drop_rates,
    parameters_ending,
    reset_scan,
    scan_map,
)
from medtune.ops.conv import Conv3x3
from medtune.ops.depthwise import depthwise_silu
from medtune.ops.gated_norm import gated_norm

EPS = 1e-5


class ChannelsLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """(B, H, W, C) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def stem(in_channels: int, width: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, H / 4, W / 4, width)."""
    half = width // 2
    return nn.Sequential(
        Conv3x3(in_channels, half, stride=2),
        ChannelsLast(),
        nn.LayerNorm(half, eps=EPS),
        ChannelsFirst(),
        nn.GELU(),
        Conv3x3(half, width, stride=2),
        ChannelsLast(),
        nn.LayerNorm(width, eps=EPS),
    )


def downsample(width: int) -> nn.Sequential:
    """(B, H, W, C) -> (B, H / 2, W / 2, 2 C), odd sides rounded up."""
    conv = Conv3x3(width, 2 * width, stride=2)
    return nn.Sequential(ChannelsFirst(), conv, ChannelsLast(), nn.LayerNorm(2 * width, eps=EPS))


class SS2D(nn.Module):
    """Two-dimensional selective scan without a gate: four one-dimensional scans of a convolved map, summed."""

    def __init__(self, width: int, expansion: int, states: int = 1) -> None:
        super().__init__()
        inner, rank = expansion * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, inner, bias=False)
        self.conv2d = Conv3x3(inner, inner, groups=inner, bias=False)
        self.x_proj = nn.Linear(inner, DIRECTIONS * (rank + 2 * states), bias=False)  # the directions' rows stacked
        self.dt_projs = nn.Linear(rank, DIRECTIONS * inner, bias=False)  # likewise
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, states))
        self.Ds = nn.Parameter(torch.empty(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner, eps=EPS)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def scanned(self) -> tuple[Tensor, ...]:
        """The parameters of the four scans, in the order `scan_map` takes them."""
        x_proj, dt_projs = (layer.weight.unflatten(0, (DIRECTIONS, -1)) for layer in (self.x_proj, self.dt_projs))
        return x_proj, dt_projs, self.dt_projs_bias, self.A_logs, self.Ds

    def forward(self, x: Tensor) -> Tensor:
        y = scan_map(depthwise_silu(self.in_proj(x), self.conv2d), *self.scanned())
        return self.out_proj(gated_norm(y, None, self.out_norm.weight, self.out_norm.bias, EPS))


class VSSBlock(nn.Module):
    """A scan and a small network for each position, both beside what they add to; (B, H, W, C) -> the same."""

    def __init__(self, width: int, expansion: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.op = SS2D(width, expansion)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        layers = {"fc1": nn.Linear(width, 4 * width), "act": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one size, then half the size unless it is the last stage."""

    def __init__(self, width: int, expansion: int, drop_paths: Sequence[float], halve: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VSSBlock(width, expansion, p) for p in drop_paths))
        self.downsample = downsample(width) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class VMamba(nn.Module):
    """images (B, C, H, W), any size from 28 up -> logits (B, num_classes)."""

    def __init__(
        self,
        depths: Sequence[int],
        width: int,
        expansion: int,
        drop_path: float,
        num_classes: int = 2,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        rates, last = iter(drop_rates(drop_path, sum(depths))), len(depths) - 1
        self.patch_embed = stem(in_channels, width)
        self.layers = nn.ModuleList(
            Stage(width * 2**i, expansion, [next(rates) for _ in range(depth)], halve=i < last)
            for i, depth in enumerate(depths)
        )
        final = width * 2**last
        head = {"norm": nn.LayerNorm(final, eps=EPS), "head": nn.Linear(final, num_classes)}
        self.classifier = nn.ModuleDict(head)
        self.apply(_reset)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay."""
        return parameters_ending(self, (".A_logs", ".Ds"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.classifier["head"](self.classifier["norm"](x).mean((1, 2)))


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SS2D):  # comes after its own linear layers
        reset_scan(*module.scanned())


BLOCKS = (VSSBlock,)
"""What activation checkpointing computes again."""


def vmamba_t(num_classes: int, in_channels: int) -> VMamba:
    return VMamba((2, 2, 8, 2), 96, 1, 0.2, num_classes, in_channels)


def vmamba_s(num_classes: int, in_channels: int) -> VMamba:
    return VMamba((2, 2, 15, 2), 96, 2, 0.3, num_classes, in_channels)


def vmamba_b(num_classes: int, in_channels: int) -> VMamba:
    return VMamba((2, 2, 15, 2), 128, 2, 0.6, num_classes, in_channels)
