"""Convolutions against PyTorch's own, whose kernels it does without on tiny maps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.ops.conv import Conv1x1, Conv3x3, PatchConv

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (4, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("channels, groups", [((6, 10), 1), ((6, 6), 6)], ids=["full", "depth-wise"])
def test_equals_pytorchs(size, stride, bias, channels, groups) -> None:
    torch.manual_seed(0)
    conv = Conv3x3(*channels, groups=groups, stride=stride, bias=bias).double()
    x = torch.randn(3, channels[0], *size, dtype=torch.float64, requires_grad=True)
    check(conv, x, F.conv2d(x, conv.weight, conv.bias, stride, padding=1, groups=groups))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.0])
def test_a_norm_behind_it_equals_pytorchs_and_takes_the_bias_away(training, momentum) -> None:
    """Momentum 0: what is computed again leaves the running statistics as they are, to the bit."""
    torch.manual_seed(0)
    conv, norm = Conv3x3(4, 6).double(), nn.BatchNorm2d(6, momentum=momentum).double().train(training)
    for values in (conv.bias, norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(values)
    expected = copy.deepcopy(norm)
    before = norm.running_mean.clone()
    x = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    y = conv.normalised(x, norm)
    torch.testing.assert_close(y, expected(F.conv2d(x, conv.weight, conv.bias, padding=1)))
    torch.testing.assert_close(norm.state_dict(), expected.state_dict())
    assert momentum > 0 or torch.equal(norm.running_mean, before)
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), [conv.bias])
    assert bool(gradient.any()) != training, "zeros in training, as an optimizer expects of every parameter"


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5)], ids=str)
def test_one_by_one_equals_pytorchs(size) -> None:
    torch.manual_seed(0)
    conv = Conv1x1(6, 10).double()
    x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    check(conv, x, F.conv2d(x, conv.weight))


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (7, 10)], ids=str)
def test_patches_equal_pytorchs_strides(size) -> None:
    torch.manual_seed(0)
    conv = PatchConv(3, 5, 4).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    check(conv, x, F.conv2d(x, conv.weight, conv.bias, stride=4).permute(0, 2, 3, 1))


def check(conv: nn.Module, x: Tensor, theirs: Tensor) -> None:
    """Values and gradients."""
    leaves, ours = [x, *conv.parameters()], conv(x)
    weight = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(y, leaves, weight) for y in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(2, 3, 3, 8), (3, 8, 8)])
def test_maps_without_a_patch_are_refused(shape) -> None:
    with pytest.raises(ValueError, match="with sides of 4 at least"):
        PatchConv(3, 5, 4)(torch.zeros(shape))
