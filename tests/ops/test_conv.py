"""The 3x3 convolution against PyTorch's own, whose kernels it does without on tiny maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medtune.ops.conv import Conv3x3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (4, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("channels, groups", [((6, 10), 1), ((6, 6), 6)], ids=["full", "depth-wise"])
def test_equals_pytorchs(size, stride, bias, channels, groups) -> None:
    torch.manual_seed(0)
    conv = Conv3x3(*channels, groups=groups, stride=stride, bias=bias).double()
    x = torch.randn(3, channels[0], *size, dtype=torch.float64, requires_grad=True)
    leaves = [x, *conv.parameters()]
    ours, theirs = conv(x), F.conv2d(x, conv.weight, conv.bias, stride, padding=1, groups=groups)
    weight = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(y, leaves, weight) for y in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
