"""Convolutions of tiny maps.

With 32 px images the last stages of the models work on maps of 2x2 and 1x1, where PyTorch's CPU kernels can be slow. 32
images forward and backward on one core, here and by nn.Conv2d (python benchmarks/convs.py): 3x3 1.3 and 12.5 ms (384
channels, 1x1), 3.7 and 3.8 ms (192, 2x2), 9.3 and 33 ms (384 to 768, 2x2, stride 2), 0.2 and 1.0 ms (768 depth-wise, 1x1);
1x1 6.9 and 15 ms (768 to 2304 channels, 1x1), 4.1 and 4.6 ms (384 to 1152, 2x2).
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
        return self._convolve(x, self.bias)

    def normalised(self, x: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
        """norm(self(x)), without adding a bias that the mean of a batch takes away again.

        In training a bias before a BatchNorm moves its running mean and nothing else, and its gradient is zero: so they
        are here, where adding it, and adding up its gradient, would each read and write every map once more.
        """
        if self.bias is None or not norm.training or isinstance(norm, nn.SyncBatchNorm):
            return norm(self(x))
        assert norm.running_mean is not None and norm.momentum is not None
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        before = norm.running_mean - self.bias.detach()
        moved = before.clone()
        beta = norm.bias + 0 * self.bias
        y = F.batch_norm(self._convolve(x, None), moved, norm.running_var, norm.weight, beta, True, norm.momentum, norm.eps)
        norm.running_mean.add_(moved - before)
        return y

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        if x.device.type != "cpu" or height * width > SMALL:
            return self._conv_forward(x, self.weight, bias)
        x = x.permute(0, 2, 3, 1)
        y = self._one_by_one(x) if height * width == 1 else self._small(x)
        return (y if bias is None else y + bias).permute(0, 3, 1, 2)

    def _one_by_one(self, x: Tensor) -> Tensor:
        """Only the kernel's centre meets the map."""
        centre = self.weight.flatten(2)[:, :, 4]
        return F.linear(x, centre) if self.groups == 1 else x * centre[:, 0]

    def _small(self, x: Tensor) -> Tensor:
        (height, width), step = x.shape[1:3], self.stride[0]
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        shifted = [padded[:, i : i + height : step, j : j + width : step] for i in range(3) for j in range(3)]
        if self.groups == 1:
            return F.linear(torch.stack(shifted, dim=-1).flatten(-2), self.weight.flatten(1))
        taps = self.weight.flatten(1).unbind(1)
        y = shifted[0] * taps[0]
        for part, tap in zip(shifted[1:], taps[1:], strict=True):
            y = y + part * tap
        return y


class Conv1x1(nn.Conv2d):
    """(B, C, H, W) -> (B, K, H, W) without bias, a matrix product for each position.

    On the CPU it is computed as one for maps of at most `SMALL` positions.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.shape[2] * x.shape[3] > SMALL:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class PatchConv(nn.Conv2d):
    """(B, C, H, W) -> (B, H // P, W // P, K): a product for each of the P x P patches; what is left of a side is not seen.

    Convolutions of three channels have no fast kernels on GPUs, matrix products do; on a CPU it depends on the sizes.
    Raises ValueError for maps without a patch.
    """

    def __init__(self, in_channels: int, out_channels: int, patch: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.kernel_size[0]
        if x.dim() != 4 or min(x.shape[2:]) < patch:
            raise ValueError(f"x must be (B, C, H, W) with sides of {patch} at least, got {tuple(x.shape)}")
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        x = x[:, :, : rows * patch, : columns * patch].unflatten(2, (rows, patch)).unflatten(4, (columns, patch))
        return F.linear(x.permute(0, 2, 4, 1, 3, 5).flatten(3), self.weight.flatten(1), self.bias)
