"""What stands between MedMamba's blocks, in Triton: halves put together and shuffled, and the gradients of both ways.

A program is BLOCK channels of each half at ROWS positions. `triton_halves.py` calls them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _at(length, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's positions and channels of a half, where a half (length, H) has them, and which there are."""
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channels = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, channels, rows * H + channels, (rows < length) & (channels < H)


@triton.jit
def _pairs(rows, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a position (length, 2 H) has the same channels shuffled, left and right by turns, and which there are."""
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    pair = tl.program_id(0) % blocks * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)[None, :]
    return rows * (2 * H) + pair, pair < 2 * H


@triton.jit
def join(
    x, left, right, scale, out, length, positions,
    SCALED: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x (length, 2 H) + left and right (length, H) by turns; right times its image's scale, of so many positions."""
    rows, _, at, there = _at(length, H, ROWS, BLOCK)
    one = tl.load(left + at, mask=there, other=0.0).to(tl.float32)
    two = tl.load(right + at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        two *= tl.load(scale + rows // positions, mask=rows < length, other=0.0)
    both_at, both_there = _pairs(rows, H, ROWS, BLOCK)
    mask = (rows < length) & both_there
    value = tl.load(x + both_at, mask=mask, other=0.0).to(tl.float32)
    value += tl.reshape(tl.join(one, two), (ROWS, 2 * BLOCK))
    tl.store(out + both_at, value, mask=mask)


@triton.jit
def part(
    dout, scale, dleft, dright, length, positions,
    SCALED: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of `join`: dleft and dright of dout."""
    rows, _, at, there = _at(length, H, ROWS, BLOCK)
    both_at, both_there = _pairs(rows, H, ROWS, BLOCK)
    both = tl.load(dout + both_at, mask=(rows < length) & both_there, other=0.0).to(tl.float32)
    one, two = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    if SCALED:
        two *= tl.load(scale + rows // positions, mask=rows < length, other=0.0)
    tl.store(dleft + at, one, mask=there)
    tl.store(dright + at, two, mask=there)


@triton.jit
def add_halves(
    dx, dleft, dright, total, length, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total (length, 2 H) = dx + dleft and dright (length, H) side by side."""
    rows, channels, at, there = _at(length, H, ROWS, BLOCK)
    first = rows * (2 * H) + channels
    one = tl.load(dx + first, mask=there, other=0.0).to(tl.float32)
    one += tl.load(dleft + at, mask=there, other=0.0).to(tl.float32)
    two = tl.load(dx + first + H, mask=there, other=0.0).to(tl.float32)
    two += tl.load(dright + at, mask=there, other=0.0).to(tl.float32)
    tl.store(total + first, one, mask=there)
    tl.store(total + first + H, two, mask=there)
