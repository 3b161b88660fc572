"""What every call of a Triton kernel needs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: x's, inside."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def dense_rows(x: Tensor) -> Tensor:
    """x with channels side by side in memory, as the kernels want them; copied only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def given_or(x: Tensor | None, instead: Tensor) -> Tensor:
    """A kernel takes an address also of what it does not read."""
    return instead if x is None else x
