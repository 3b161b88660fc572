"""A depth-wise 3x3 convolution and its SiLU as one operation, of maps with channels last."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from medtune.ops.conv import Conv3x3
from medtune.ops.engines import in_kernels


def depthwise_silu(x: Tensor, conv: Conv3x3) -> Tensor:
    """silu(conv(x)) for a depth-wise `conv` of stride 1: (B, H, W, D) -> the same.

    Where our kernels run, x is read where it lies, also as a half of wider rows, and once; else it goes through `conv`.
    """
    assert conv.groups == x.shape[-1] == conv.out_channels and conv.stride == (1, 1), "depth-wise, of stride 1"
    if not in_kernels(x):
        return F.silu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    from medtune.ops.triton_depthwise import triton_depthwise_silu

    return triton_depthwise_silu(x, conv.weight, conv.bias)
