"""MedViT (Manzari et al. 2023, arXiv:2302.09462), written from the paper and the shapes of the released checkpoints.

Source:     https://github.com/Omid-Nejati/MedViT; parameter names are the released ones, so its checkpoints load
Deviations: from the released model: where a map has fewer positions than a run that attention pools (16 and 4; there it
            fails), the run is the whole map; positions past the last whole run are left out of keys and values, as
            released. From the paper: the patch momentum changer, which the released model lacks, is an option.
Maps are (B, C, H, W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.models.layers import DropPath, drop_rates
from medtune.ops.conv import Conv1x1, Conv3x3

HEAD = 32
"""Channels of an attention head, and of a group of the grouped convolutions."""
ATTENDED = 0.75
"""Share of a transformer block's width that goes through self-attention."""
OWN_LABEL = 0.9
"""Weight of an image's own label in the loss where it took another's moments; the other's label has the rest."""
MOMENT_EPS = 1e-5


def exchange_moments(x: Tensor, partners: Tensor) -> Tensor:
    """Give every image its partner's mean and spread over the channels, position by position (MoEx, arXiv:2002.11102).

    x: (B, C, H, W); partners: int64 (B,), whose moments each image takes, its own number for none. In float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float()
        variance, mean = torch.var_mean(wide, dim=1, keepdim=True)
        spread = (variance + MOMENT_EPS).sqrt()
        return ((wide - mean) / spread * spread[partners] + mean[partners]).to(x.dtype)


class ConvNorm(nn.Module):
    """3x3 convolution, BatchNorm, ReLU; (B, C, H, W) -> (B, K, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv3x3(in_channels, out_channels, stride=stride, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, K, H / stride, W / stride), odd sides rounded up."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Conv1x1(in_channels, out_channels)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return self.norm(self.conv(x))


def patch_embed(in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    """Nothing where neither size nor width changes."""
    changes = stride > 1 or in_channels != out_channels
    return PatchEmbed(in_channels, out_channels, stride) if changes else nn.Identity()


class MHCA(nn.Module):
    """Multi-head convolutional attention: a grouped convolution mixed by a 1x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # PyTorch's own also on tiny maps: its grouped kernels are fast there, unlike the depth-wise and full ones.
        self.group_conv3x3 = nn.Conv2d(width, width, 3, padding=1, groups=width // HEAD, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.projection = Conv1x1(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.relu(self.norm(self.group_conv3x3(x))))


class SqueezeExcite(nn.Module):
    """Scale channels by what their means say."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[..., None, None]


class LFFN(nn.Module):
    """Local feed-forward network: a small network for each position with a depth-wise convolution inside, and a skip."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        inner = ratio * width
        self.conv = nn.Sequential(
            Conv1x1(width, inner),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
            Conv3x3(inner, inner, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
            SqueezeExcite(inner, ratio),
            Conv1x1(inner, width),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ECB(nn.Module):
    """Efficient convolution block; (B, C, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.patch_embed = patch_embed(in_channels, width, stride)
        self.mhca = MHCA(width)
        self.drop_path = DropPath(drop_path)
        self.norm = nn.BatchNorm2d(width)
        self.conv = LFFN(width, ratio=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mhca(x))
        return x + self.conv(self.norm(x))


class Attention(nn.Module):
    """Self-attention whose keys and values are means over runs of consecutive tokens; (B, L, C) -> (B, L, C)."""

    def __init__(self, width: int, run: int) -> None:
        super().__init__()
        self.run = run
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        if run > 1:
            self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x
        if self.run > 1:
            runs = F.avg_pool1d(x.transpose(1, 2), min(self.run, x.shape[1]))
            pooled = self.norm(runs).transpose(1, 2)
        tokens = (self.q(x), self.k(pooled), self.v(pooled))
        q, k, v = (t.unflatten(2, (-1, HEAD)).transpose(1, 2) for t in tokens)  # (B, heads, ., 32)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LTB(nn.Module):
    """Local transformer block: self-attention, and beside it a convolution that takes its result."""

    def __init__(self, in_channels: int, width: int, run: int, drop_path: float) -> None:
        super().__init__()
        attended = int(ATTENDED * width / HEAD) * HEAD
        local = width - attended
        self.patch_embed = patch_embed(in_channels, attended)
        self.norm1 = nn.BatchNorm2d(attended)
        self.e_mhsa = Attention(attended, run)
        self.drop_attention = DropPath(ATTENDED * drop_path)
        self.projection = patch_embed(attended, local)
        self.mhca = MHCA(local)
        self.drop_local = DropPath((1 - ATTENDED) * drop_path)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv = LFFN(width, ratio=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = self.e_mhsa(self.norm1(x).flatten(2).transpose(1, 2))
        x = x + self.drop_attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])
        y = self.projection(x)
        x = torch.cat((x, y + self.drop_local(self.mhca(y))), dim=1)
        return x + self.conv(self.norm2(x))


def stem(in_channels: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, 64, H / 4, W / 4)."""
    widths = ((in_channels, 64, 2), (64, 32, 1), (32, 64, 1), (64, 64, 2))
    return nn.Sequential(*(ConvNorm(before, after, stride) for before, after, stride in widths))


Kind = tuple[type[ECB] | type[LTB], int]
"""A block and its width."""


def blocks(repeats: int, drop_path: float) -> nn.Sequential:
    """The four stages in one row; the third has `repeats` times its four ECBs and one LTB."""
    third: list[Kind] = [*[(ECB, 384)] * 4, (LTB, 512)]
    stages: list[list[Kind]] = [
        [(ECB, 96)] * 3,
        [*[(ECB, 192)] * 3, (LTB, 256)],
        third * repeats,
        [*[(ECB, 768)] * 2, (LTB, 1024)],
    ]
    rates = iter(drop_rates(drop_path, sum(map(len, stages))))
    row: list[nn.Module] = []
    channels = 64
    for run, stage in zip((64, 16, 4, 1), stages, strict=True):
        for i, (kind, width) in enumerate(stage):
            stride = 2 if i == 0 and row else 1  # a stage begins with an ECB
            row.append(kind(channels, width, run if kind is LTB else stride, next(rates)))
            channels = width
    return nn.Sequential(*row)


class MedViT(nn.Module):
    """images (B, C, H, W), any size from 28 up -> logits (B, num_classes)."""

    def __init__(
        self,
        repeats: int,
        drop_path: float,
        num_classes: int = 2,
        in_channels: int = 3,
        patch_momentum: bool = False,
    ) -> None:
        super().__init__()
        self.patch_momentum = patch_momentum
        self.stem = stem(in_channels)
        self.features = blocks(repeats, drop_path)
        self.norm = nn.BatchNorm2d(1024)
        self.proj_head = nn.Sequential(nn.Linear(1024, num_classes))
        self.apply(_reset)

    def forward(self, x: Tensor, partners: Tensor | None = None) -> Tensor:
        """partners: int64 (B,), whose feature moments each image takes (`exchange_moments`); in training alone.

        Raises ValueError for partners of a model that was not built with patch_momentum.
        """
        if partners is not None and not self.patch_momentum:
            raise ValueError("this model was built without patch_momentum and takes no partners")
        x = self.stem(x)
        if partners is not None and self.training:
            x = exchange_moments(x, partners)
        return self.proj_head(self.norm(self.features(x)).mean((2, 3)))


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


BLOCKS = (ECB, LTB)
"""What activation checkpointing computes again."""
CHANNELS_LAST = BLOCKS
"""Convolutions are most of it: `medtune.models.layout`."""


def medvit_small(num_classes: int, in_channels: int, patch_momentum: bool = False) -> MedViT:
    return MedViT(2, 0.1, num_classes, in_channels, patch_momentum)


def medvit_base(num_classes: int, in_channels: int, patch_momentum: bool = False) -> MedViT:
    return MedViT(4, 0.2, num_classes, in_channels, patch_momentum)


def medvit_large(num_classes: int, in_channels: int, patch_momentum: bool = False) -> MedViT:
    return MedViT(6, 0.2, num_classes, in_channels, patch_momentum)
