"""A model's blocks compiled by torch.compile, which makes one kernel of several operations: less memory is read and written.

Blocks of one class and shape share the code, within a process, and on disk between processes (PyTorch's own cache). A
class whose methods are to be compiled by themselves, as they run on different streams, names them: `compiled_one_by_one`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from medtune.models.parts import parts_of

MOST_SHAPES = 64
"""Shapes of one class of blocks that a process compiles, of all its trials; others run as they are."""

OF_ROWS = {"layout_optimization": False, "combo_kernels": True}
"""Inductor's options for blocks of maps (B, H, W, C) or tokens, which it takes for (B, C, H, W) and would turn round in
memory before and after each. Small operations beside each other, weights' conversions above all, become one kernel. What
both give MedMamba: benchmarks/NOTES.md. Convolutional networks, CHANNELS_LAST, have its defaults."""


@contextlib.contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """The model's BLOCKS and COMPILED run compiled inside; the first run of each shape takes seconds to a minute."""
    import torch._dynamo

    blocks: list[Any] = parts_of(model, "BLOCKS") + parts_of(model, "COMPILED")
    of_rows = not parts_of(model, "CHANNELS_LAST")
    methods = [(block, name) for block in blocks for name in getattr(block, "compiled_one_by_one", ("forward",))]
    for block, name in methods:
        kind: Any = type(block)
        setattr(block, name, functools.partial(_compiled(kind, name, of_rows), block))
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=8 * MOST_SHAPES):
            yield
    finally:
        for block, name in methods:
            delattr(block, name)


@functools.cache
def _compiled(kind: Any, name: str, of_rows: bool) -> Any:
    return torch.compile(getattr(kind, name), dynamic=False, options=dict(OF_ROWS) if of_rows else None)
