"""A depth-wise convolution with its SiLU: who computes it. What the kernels compute: `test_triton.py`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medtune.models import medmamba, vmamba
from medtune.ops import depthwise, triton_depthwise
from medtune.ops.conv import Conv3x3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [(1, 1), (3, 5)], ids=str)
def test_equals_pytorchs_where_there_are_no_kernels(size) -> None:
    torch.manual_seed(0)
    conv = Conv3x3(6, 6, groups=6).double()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    y = F.silu(F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=6))
    torch.testing.assert_close(depthwise.depthwise_silu(x, conv), y.permute(0, 2, 3, 1))


@pytest.mark.parametrize("make, row", [(lambda: medmamba.SS2D(4), 16), (lambda: vmamba.SS2D(4, 2), 8)])
def test_the_kernels_are_given_rows_as_they_lie_and_the_parameters(monkeypatch, make, row) -> None:
    asked = []
    monkeypatch.setattr(depthwise, "in_kernels", lambda x: True)
    monkeypatch.setattr(triton_depthwise, "triton_depthwise_silu", lambda *given: asked.append(given) or given[0])
    branch = make()
    branch(torch.randn(2, 3, 5, 4))
    ((x, weight, bias),) = asked
    assert x.shape == (2, 3, 5, 8) and x.stride() == (15 * row, 5 * row, row, 1)
    assert weight is branch.conv2d.weight and bias is branch.conv2d.bias


@pytest.mark.parametrize(("side", "most", "lines"), [(56, 7, 7), (7, 4, 4), (14, 4, 2), (1, 7, 1), (3, 7, 3), (8, 7, 4)])
def test_tiles_fit_the_map(side, most, lines) -> None:
    assert triton_depthwise._part(side, most) == lines
