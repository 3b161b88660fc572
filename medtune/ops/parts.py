"""Sums over the many parts that programs of a kernel leave, each of few values: gradients of what belongs to channels.

PyTorch's reduction has a program for some hundred columns, which are a few programs that read all parts one after the other.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from medtune.ops.launch import on

ROWS, COLUMNS = 64, 32
"""Parts, and values of each, that a program takes at once."""


def add_parts(parts: Tensor) -> Tensor:
    """The sums (G, ...) of parts (G, K, ...), contiguous and in float32; same input, same bits."""
    total = parts.new_empty((parts.shape[0], *parts.shape[2:]))
    count = math.prod(parts.shape[2:])
    with on(parts):
        _add_parts[(triton.cdiv(count, COLUMNS), len(parts))](
            parts, total, parts.shape[1], count, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8
        )
    return total


@triton.jit(do_not_specialize=["parts"])
def _add_parts(each, total, parts, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    each += tl.program_id(1).to(tl.int64) * parts * count
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, parts, ROWS):
        there = (first + row < parts)[:, None] & (column < count)[None, :]
        sums += tl.load(each + (first + row[:, None]) * count + column[None, :], mask=there, other=0.0)
    tl.store(total + tl.program_id(1) * count + column, tl.sum(sums, 0), mask=column < count)
