"""Convolutions of tiny maps.

With 32 px images MedMamba's last stages work on maps of 2x2 and 1x1, where PyTorch's CPU kernels are slow. 32 images
forward and backward on one core, here and by nn.Conv2d: 3.3 and 23 ms (384 channels, 1x1), 5.1 and 8.3 ms (192, 2x2),
0.3 and 8.9 ms (768 depth-wise, 1x1), 3.9 and 5.2 ms (384 depth-wise, 2x2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 4
"""Positions of a map up to which matrix products are faster on the CPU."""


class Conv3x3(nn.Conv2d):
    """(B, C, H, W) -> (B, K, H / stride, W / stride), padding 1: all channels to all, or each its own (groups = C = K).

    On the CPU, maps of at most `SMALL` positions go through matrix products (same values, up to rounding).
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, stride: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, groups=groups, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if x.device.type != "cpu" or height * width > SMALL:
            return super().forward(x)
        x = x.permute(0, 2, 3, 1)
        y = self._one_by_one(x) if height * width == 1 else self._small(x)
        return y.permute(0, 3, 1, 2)

    def _one_by_one(self, x: Tensor) -> Tensor:
        """Only the kernel's centre meets the map."""
        centre = self.weight.flatten(2)[:, :, 4]
        return F.linear(x, centre, self.bias) if self.groups == 1 else self._add_bias(x * centre[:, 0])

    def _small(self, x: Tensor) -> Tensor:
        (height, width), step = x.shape[1:3], self.stride[0]
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        shifted = [padded[:, i : i + height : step, j : j + width : step] for i in range(3) for j in range(3)]
        if self.groups == 1:
            return F.linear(torch.stack(shifted, dim=-1).flatten(-2), self.weight.flatten(1), self.bias)
        taps = self.weight.flatten(1).unbind(1)
        y = self._add_bias(shifted[0] * taps[0])
        for part, tap in zip(shifted[1:], taps[1:], strict=True):
            y = y + part * tap
        return y

    def _add_bias(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias


class Conv1x1(nn.Conv2d):
    """(B, C, H, W) -> (B, K, H, W) without bias, a matrix product for each position.

    On the CPU it is one for maps of at most `SMALL` positions: there and back 5.4 for 12 ms (768 to 2304 channels, 1x1, 32
    images, one core), 3.8 for 4.6 ms (384 to 1152, 2x2).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.shape[2] * x.shape[3] > SMALL:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)
