"""PyTorch's own checks of what operators must promise it, for ours, as `TRITON_INTERPRET=1 python -m tests.ops.operators`.

Prints JSON: each operator's checks that failed. That what is traced is what runs: shapes, strides, types, no result that is
an input, gradients.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from medtune.ops import triton_depthwise, triton_norm, triton_scan  # noqa: F401  which register the operators
from tests.ops.triton_cases import for_the_interpreter


def given(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def detached(*values: Any) -> tuple[Any, ...]:
    return tuple(v.detach() if isinstance(v, Tensor) else v for v in values)


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Small ones: an operation takes milliseconds by the interpreter."""
    ours, channels, states = torch.ops.medtune, 3, 1
    half = torch.randn(1, 2, 2, 8)[..., 4:].requires_grad_()
    A = (-torch.rand(4, states, channels)).requires_grad_()
    mapped = (given(1, 2, 2, channels), given(1, 2, 2, 4 * channels + 8 * states), A, given(4, channels), None, True, True)
    y, kept, mixed = ours.scan_map(*mapped)
    steps = torch.randn(1, 5, 2, channels).permute(2, 0, 1, 3).requires_grad_()
    rates, mix = (-torch.rand(2, states, channels)).requires_grad_(), given(2, 1, 2, 2 * states, 4)
    along = (given(2, 1, 5, channels), steps, rates, None, given(2, channels), mix, True, True)
    z, entered = ours.scan(*along)
    return {
        "depthwise_silu": (ours.depthwise_silu, (half, given(9, 4), None)),
        "depthwise_silu_backward": (
            ours.depthwise_silu_backward, detached(half, given(9, 4), given(4), torch.randn(1, 2, 2, 4)),
        ),
        "gated_norm": (ours.gated_norm, (given(1, 2, 2, 4), half, given(4), given(4), 1e-5)),
        "gated_norm_backward": (
            ours.gated_norm_backward, detached(given(1, 2, 2, 4), half, given(4), given(4), torch.randn(1, 2, 2, 4), 1e-5),
        ),
        "scan_map": (ours.scan_map, mapped),
        "scan_map_backward": (ours.scan_map_backward, detached(*mapped[:5], kept, mixed, torch.ones_like(y), True)),
        "scan": (ours.scan, along),
        "scan_backward": (ours.scan_backward, detached(*along[:6], entered, torch.ones_like(z), True)),
    }  # fmt: skip


def main() -> None:
    for_the_interpreter()
    torch.manual_seed(0)
    # What enters the first chunk is never written and never read: two runs are compared to the last bit.
    fresh = Tensor.new_empty
    Tensor.new_empty = lambda self, *shape, **kind: fresh(self, *shape, **kind).zero_()  # type: ignore[method-assign]
    found = {
        name: {check: said for check, said in torch.library.opcheck(op.default, args, raise_exception=False).items()
               if said != "SUCCESS"}
        for name, (op, args) in cases().items()
    }  # fmt: skip
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
