"""The causal convolution against its definition, and which kernel it asks."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import medtune.ops.causal_conv as module
from medtune.ops.causal_conv import causal_conv1d
from tests.conftest import OnCuda

pytestmark = pytest.mark.usefixtures("one_thread")


def loop(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The definition, position by position."""
    out = torch.zeros_like(x)
    for t in range(x.shape[2]):
        for back in range(min(weight.shape[1], t + 1)):
            out[..., t] += weight[:, -1 - back] * x[..., t - back]
    out = out if bias is None else out + bias[:, None]
    return F.silu(out) if activation else out


def inputs(length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    shapes = ((2, 6, length), (6, 4), (6,))
    x, weight, bias = (torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_definition(length, activation, biased) -> None:
    x, weight, bias = inputs(length)
    leaves = [x, weight, bias] if biased else [x, weight]
    ours, exact = causal_conv1d(*leaves, activation=activation), loop(*leaves, activation=activation)
    torch.testing.assert_close(ours, exact)
    gradients = (torch.autograd.grad(y.square().sum(), leaves) for y in (ours, exact))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_free_strides() -> None:
    x, weight, bias = inputs()
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(last, weight, bias), causal_conv1d(x, weight, bias))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"x": torch.zeros(2, 6)}, r"x must be \(B, D, L\)"),
        ({"weight": torch.zeros(5, 4)}, r"weight \(D, W\)"),
        ({"bias": torch.zeros(5)}, r"bias must be \(6,\)"),
        ({"activation": "relu"}, "None or 'silu', got 'relu'"),
    ],
)
def test_what_does_not_fit_is_named(change, said) -> None:
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match=said):
        causal_conv1d(**{"x": x, "weight": weight, "bias": bias, **change})


def test_kernel_is_found_when_installed_and_only_then(monkeypatch) -> None:
    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = loop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    assert module._cuda_kernel() is None
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    assert module._cuda_kernel() is loop


def test_kernel_is_asked_in_its_own_terms(monkeypatch) -> None:
    asked = []

    def kernel(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
               final_states_out=None, activation=None):  # fmt: skip
        """causal-conv1d's signature."""
        asked.append((x.shape, weight.shape, activation))
        assert seq_idx is None and initial_states is None and not return_final_states and final_states_out is None
        return loop(x, weight, bias, activation)

    monkeypatch.setattr(module, "_CUDA_KERNEL", kernel)
    x, weight, bias = (v.detach().float() for v in inputs())
    plain = causal_conv1d(x, weight, bias, activation="silu")
    assert not asked
    by_kernel = causal_conv1d(x.as_subclass(OnCuda), weight, bias, activation="silu")
    assert asked == [((2, 6, 9), (6, 4), "silu")]
    torch.testing.assert_close(by_kernel.as_subclass(torch.Tensor), plain)


@pytest.mark.gpu
def test_cuda_equals_the_definition() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, weight, bias = (v.detach().float() for v in inputs(64))
    on_device = causal_conv1d(x.cuda(), weight.cuda(), bias.cuda(), activation="silu").cpu()
    torch.testing.assert_close(on_device, loop(x, weight, bias, "silu"), rtol=1e-4, atol=1e-5)
