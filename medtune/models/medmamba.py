"""MedMamba (Yue & Li 2024, arXiv:2403.03849), written from the paper and the shapes of the released checkpoints.

Source:     https://github.com/YubiaoYue/MedMamba; parameter names are the released ones, so its checkpoints load
Deviations: from the paper, as the released model: the convolution branch is two full 3x3 convolutions and a 1x1, the
            depths of s and b are 2-2-8-2 and 2-2-12-2 (the paper's parameter counts need 2-2-12-2 and 2-2-16-2);
            from the released model: a side of 1 is padded before patch merging, so 28x28 runs; other odd sides lose
            their last row or column there, as released.
Maps are (B, H, W, C) unless said.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.models.layers import (
    DIRECTIONS,
    DropPath,
    drop_rates,
    parameters_ending,
    reset_scan,
    scan_map,
)
from medtune.ops.beside import Ahead, ahead, both
from medtune.ops.conv import Conv3x3, PatchConv
from medtune.ops.depthwise import depthwise_silu
from medtune.ops.engines import in_kernels
from medtune.ops.gated_norm import gated_norm

if TYPE_CHECKING:
    from medtune.ops.triton_branch import Ready

EPS = 1e-5


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """In x' dtype, also where autocast norms in float32."""
    return gated_norm(x, None, norm.weight, norm.bias, EPS).to(x.dtype)


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, H / 4, W / 4, width)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = PatchConv(in_channels, width, 4)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return _normed(self.proj(x), self.norm)


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, 2 C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, int(x.shape[2] == 1), 0, int(x.shape[1] == 1)))
        b, h, w, c = x.shape
        cells = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
        cells = cells.permute(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)
        return self.reduction(_normed(cells, self.norm))


class SS2D(nn.Module):
    """Two-dimensional selective scan: four one-dimensional scans of a gated, convolved map, summed."""

    def __init__(self, width: int, states: int = 16) -> None:
        super().__init__()
        inner, rank = 2 * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = Conv3x3(inner, inner, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, rank + 2 * states, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, states))
        self.Ds = nn.Parameter(torch.empty(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner, eps=EPS)
        self.out_proj = nn.Linear(inner, width, bias=False)
        reset_scan(*self.scanned())

    def scanned(self) -> tuple[Tensor, ...]:
        """The parameters of the four scans, in the order `scan_map` takes them."""
        return self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = scan_map(depthwise_silu(x, self.conv2d), *self.scanned())
        return self.out_proj(gated_norm(y, z, self.out_norm.weight, self.out_norm.bias, EPS))


class SSConvSSM(nn.Module):
    """Half of the channels through convolutions, half through the scan, then shuffled; (B, H, W, C) -> the same."""

    compiled_one_by_one = ("convolve",)

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        half = width // 2
        self.ln_1 = nn.LayerNorm(half, eps=EPS)
        self.self_attention = SS2D(half)
        self.drop_path = DropPath(drop_path)
        self.conv33conv33conv11 = nn.Sequential(
            nn.BatchNorm2d(half),
            Conv3x3(half, half),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            Conv3x3(half, half),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, kernel_size=1),
            nn.ReLU(),
        )

    def convolve(self, left: Tensor) -> Tensor:
        first_norm, conv, norm, _, second_conv, second_norm, _, last, _ = cast(Any, self.conv33conv33conv11)
        x = F.relu(conv.normalised(first_norm(left.permute(0, 3, 1, 2)), norm))
        x = F.relu(second_conv.normalised(x, second_norm))
        # A product for each position: cuDNN's kernel for the gradient of so few weights takes five times as long.
        return F.relu(F.linear(x.permute(0, 2, 3, 1), last.weight.flatten(1), last.bias))

    def ready(self, images: int, dtype: torch.dtype) -> Ready:
        """The scan's weights, its products in dtype, and what stochastic depth draws, for our kernels."""
        from medtune.ops.branch_weights import Parameters
        from medtune.ops.triton_branch import ready

        norm, s = self.ln_1, self.self_attention
        conv_bias = s.conv2d.bias
        assert conv_bias is not None
        parameters = Parameters(
            norm.weight, norm.bias, s.in_proj.weight, s.conv2d.weight, conv_bias,
            s.x_proj_weight, s.dt_projs_weight, s.dt_projs_bias, s.A_logs, s.Ds,
            s.out_norm.weight, s.out_norm.bias, s.out_proj.weight,
        )  # fmt: skip
        return ready(parameters, dtype, self.drop_path.scale(images, norm.weight.device))

    def forward(self, x: Tensor, given: Ahead[Ready] | None = None) -> Tensor:
        if given is not None:
            return self._by_kernels(x, given)
        left, right = x.chunk(2, dim=-1)
        left, right = self.convolve(left), self.drop_path(self.self_attention(self.ln_1(right)))
        return x + torch.stack((left, right), dim=-1).flatten(-2)

    def _by_kernels(self, x: Tensor, given: Ahead[Ready]) -> Tensor:
        from medtune.ops.triton_branch import triton_scan_branch
        from medtune.ops.triton_halves import triton_halves, triton_join

        x, left, right = triton_halves(x)
        left, right = both(self.convolve, left, lambda x: triton_scan_branch(x, given.get(), EPS), right)
        return triton_join(x, left, right, given.get().scale)


class Stage(nn.Module):
    """Blocks at one size, then patch merging unless it is the last stage."""

    def __init__(self, width: int, drop_paths: Sequence[float], merge: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SSConvSSM(width, p) for p in drop_paths)
        self.downsample = PatchMerging(width) if merge else None

    def forward(self, x: Tensor, given: Iterator[Ahead[Ready] | None]) -> Tensor:
        for block in self.blocks:
            x = block(x, next(given))
        return x if self.downsample is None else self.downsample(x)


class MedMamba(nn.Module):
    """images (B, C, H, W), any size from 28 up -> logits (B, num_classes)."""

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        width: int = 96,
        num_classes: int = 2,
        in_channels: int = 3,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        rates = iter(drop_rates(drop_path, sum(depths)))
        self.patch_embed = PatchEmbed(in_channels, width)
        self.layers = nn.ModuleList(
            Stage(width * 2**i, [next(rates) for _ in range(depth)], merge=i < len(depths) - 1)
            for i, depth in enumerate(depths)
        )
        self.head = nn.Linear(width * 2 ** (len(depths) - 1), num_classes)
        self.apply(_reset)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay."""
        return parameters_ending(self, (".A_logs", ".Ds"))

    def forward(self, x: Tensor) -> Tensor:
        given = iter(self._ready(x))
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x, given)
        return self.head(x.mean((1, 2)))

    def _ready(self, x: Tensor) -> list[Ahead[Ready] | None]:
        """For each block, what its scan takes where our kernels run."""
        blocks = [module for module in self.layers.modules() if isinstance(module, SSConvSSM)]
        if not in_kernels(x):
            return [None] * len(blocks)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return [ahead(functools.partial(block.ready, len(x), dtype)) for block in blocks]


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


BLOCKS = (SSConvSSM,)
"""What activation checkpointing computes again."""
COMPILED = (PatchEmbed, PatchMerging)
"""What is compiled beside the blocks."""
FILTERS_LAST = BLOCKS
"""What has its convolutions' weights laid out as cuDNN reads them."""


def medmamba_t(num_classes: int, in_channels: int) -> MedMamba:
    return MedMamba((2, 2, 4, 2), 96, num_classes, in_channels)


def medmamba_s(num_classes: int, in_channels: int) -> MedMamba:
    return MedMamba((2, 2, 8, 2), 96, num_classes, in_channels)


def medmamba_b(num_classes: int, in_channels: int) -> MedMamba:
    return MedMamba((2, 2, 12, 2), 128, num_classes, in_channels)
