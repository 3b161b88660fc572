"""What follows a scan: a layer norm of its sum, in Mamba's blocks times SiLU of a gate."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from medtune.ops.engines import in_kernels


def gated_norm(y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(y) * silu(z), or norm(y) where z is None; y, z: (B, H, W, D), rows any distance apart; weight, bias: (D,).

    Where our kernels run: in float32 inside whatever autocast says, the result in z's dtype (y's where z is None). Else by
    PyTorch's operators, whose dtypes they are.
    """
    if not in_kernels(y):
        normal = F.layer_norm(y, weight.shape, weight, bias, eps)
        return normal if z is None else normal * F.silu(z)
    from medtune.ops.triton_norm import triton_gated_norm

    return triton_gated_norm(y, z, weight, bias, eps)
