"""Which models are tested in full, and against what: a model told once more in float64."""

from collections.abc import Mapping

import pytest
from torch import Tensor, nn

from medtune.models import _MODULES

SMALL = tuple({module: name for name, module in reversed(_MODULES.items())}.values())
"""The first of each file, for what takes long: the larger variants are the same code with other numbers."""

LARGER = tuple(name for name in _MODULES if name not in SMALL)
FULL = (*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER))
"""All of them; the larger ones in `make test-slow`."""


def assert_equals_exact(model: nn.Module, logits: Tensor, exact: Tensor, exact_weights: Mapping[str, Tensor]) -> None:
    """Logits, and every parameter's gradient of their squares' sum, are those of the float64 telling."""
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()

    exact.square().sum().backward()
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        expected = exact_weights[name].grad
        assert expected is not None and p.grad is not None
        assert (p.grad - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-7, name
