"""Causal depth-wise convolution along a sequence, the short one in front of Mamba's scan.

One function, two ways: causal-conv1d's CUDA kernel where it is installed, else PyTorch on any device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Literal["silu"] | None = None
) -> Tensor:
    """Every channel's own convolution that sees a position and those before it: (B, D, L) -> (B, D, L).

    weight: (D, W), the last of the W taps meets the position itself; bias: (D,); activation: taken of the result.
    Raises ValueError when shapes do not fit or the activation is another.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"x must be (B, D, L) and weight (D, W), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if _CUDA_KERNEL is not None and x.is_cuda and x.dtype != torch.float64:
        return _CUDA_KERNEL(x, weight, bias, activation=activation)
    padded = F.pad(x.transpose(1, 2), (0, 0, weight.shape[1] - 1, 0)).transpose(1, 2)
    # As images of one row, channels last in memory: 32 sequences of 5 there and back in 0.9 ms on a core, by conv1d 2.5 ms
    # (python benchmarks/convs.py).
    y = F.conv2d(padded.unsqueeze(2), weight[:, None, None], bias, groups=len(weight)).squeeze(2)
    return F.silu(y) if activation else y


def _cuda_kernel() -> Callable[..., Tensor] | None:
    """causal-conv1d's kernel, or None where the package is not installed."""
    try:
        module = importlib.import_module("causal_conv1d")
    except ImportError:
        return None
    return module.causal_conv1d_fn


_CUDA_KERNEL = _cuda_kernel()
