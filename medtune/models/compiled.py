"""A model's blocks compiled by torch.compile, which makes one kernel of several operations: less memory is read and written.

Blocks of one class and shape share the code, within a process, and on disk between processes (PyTorch's own cache).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from medtune.models import modules

MOST_SHAPES = 64
"""Shapes of one class of blocks that a process compiles, of all its trials; others run as they are."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that the model files name."""
    kinds = tuple(kind for name in modules() if name in sys.modules for kind in sys.modules[name].BLOCKS)
    return [module for module in model.modules() if isinstance(module, kinds)]


@contextlib.contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """The model's blocks run compiled inside; the first run of each shape takes seconds to a minute."""
    import torch._dynamo

    blocks: list[Any] = blocks_of(model)
    for block in blocks:
        kind: Any = type(block)
        block.forward = functools.partial(_compiled(kind), block)
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=8 * MOST_SHAPES):
            yield
    finally:
        for block in blocks:
            del block.forward


@functools.cache
def _compiled(kind: Any) -> Any:
    return torch.compile(kind.forward, dynamic=False)
