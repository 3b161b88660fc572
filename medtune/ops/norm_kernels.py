"""A layer norm's kernels in Triton, gated or not, forward and backward; `triton_norm.py` calls them.

A program takes tiles of rows (positions), one after the other, each row whole: PARTS pieces of BLOCK channels side by side,
so that 96 channels, or 768, are three pieces without a masked lane. The pieces are added up before lanes are, which are few
for each row. What belongs to a channel (weight, bias, and their gradients' sums) stays in registers from tile to tile.
Nothing is added atomically: same input, same bits.
"""

# ruff: noqa: RUF005  (Triton unpacks no tuple inside another)

from __future__ import annotations

import triton
import triton.language as tl

from medtune.ops.kernel_math import sigmoid


@triton.jit
def _piece(i: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of piece i, and which of them there are."""
    channels = i * BLOCK + tl.arange(0, BLOCK)
    return channels, channels < D


@triton.jit
def _of_channels(x, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The pieces (1, BLOCK) of a parameter."""
    pieces = ()
    for i in tl.static_range(PARTS):
        channels, there = _piece(i, D, BLOCK)
        pieces = pieces + (tl.load(x + channels, mask=there, other=0.0).to(tl.float32)[None, :],)
    return pieces


@triton.jit
def _load(x, first, stride, rows, length, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The pieces of a tile (ROWS, BLOCK) in float32, zero past the end."""
    pieces = ()
    x += first.to(tl.int64) * stride
    for i in tl.static_range(PARTS):
        channels, there = _piece(i, D, BLOCK)
        mask = (first + rows < length)[:, None] & there[None, :]
        piece = tl.load(x + rows[:, None] * stride + channels[None, :], mask=mask, other=0.0)
        pieces = pieces + (piece.to(tl.float32),)
    return pieces


@triton.jit
def _store(x, piece, i: tl.constexpr, first, stride, rows, length, D: tl.constexpr, BLOCK: tl.constexpr):
    """One piece of a tile."""
    channels, there = _piece(i, D, BLOCK)
    mask = (first + rows < length)[:, None] & there[None, :]
    x += first.to(tl.int64) * stride
    tl.store(x + rows[:, None] * stride + channels[None, :], piece.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _normalised(y, eps, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The pieces less their row's mean, and one by the row's standard deviation (ROWS, 1)."""
    total = y[0]
    for i in tl.static_range(1, PARTS):
        total += y[i]
    mean = tl.sum(total, 1)[:, None] * (1.0 / D)
    centred = ()
    squares = tl.zeros_like(total)
    for i in tl.static_range(PARTS):
        piece = y[i] - mean
        if D % BLOCK:
            piece = tl.where(_piece(i, D, BLOCK)[1][None, :], piece, 0.0)
        squares += piece * piece
        centred = centred + (piece,)
    return centred, tl.rsqrt(tl.sum(squares, 1)[:, None] * (1.0 / D) + eps)


@triton.jit
def norm_forward(
    y, z, weight, bias, out, y_stride, z_stride, length, eps,
    GATED: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y, z: (length, D), rows y_stride and z_stride apart; out: (length, D) contiguous, norm(y) or norm(y) * silu(z)."""
    rows = tl.arange(0, ROWS)
    w = _of_channels(weight, D, PARTS, BLOCK)
    b = _of_channels(bias, D, PARTS, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(length, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tile * ROWS
        value = _load(y, first, y_stride, rows, length, D, PARTS, BLOCK)
        if GATED:
            gate = _load(z, first, z_stride, rows, length, D, PARTS, BLOCK)
        centred, scale = _normalised(value, eps, D, PARTS, BLOCK)
        for i in tl.static_range(PARTS):
            piece = centred[i] * scale * w[i] + b[i]
            if GATED:
                piece *= gate[i] * sigmoid(gate[i])
            _store(out, piece, i, first, D, rows, length, D, BLOCK)


@triton.jit
def norm_backward(
    y, z, weight, bias, dout, dy, dz, sums, y_stride, z_stride, dout_stride, dz_stride, length, eps,
    GATED: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As above; dy: (length, D) contiguous, dz by its stride; sums: (programs, 2, D), each program's dweight and dbias."""
    rows = tl.arange(0, ROWS)
    w = _of_channels(weight, D, PARTS, BLOCK)
    b = _of_channels(bias, D, PARTS, BLOCK)
    dw = ()
    db = ()
    for _ in tl.static_range(PARTS):
        dw = dw + (tl.zeros((ROWS, BLOCK), tl.float32),)
        db = db + (tl.zeros((ROWS, BLOCK), tl.float32),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(length, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tile * ROWS
        value = _load(y, first, y_stride, rows, length, D, PARTS, BLOCK)
        slope = _load(dout, first, dout_stride, rows, length, D, PARTS, BLOCK)
        if GATED:
            gate = _load(z, first, z_stride, rows, length, D, PARTS, BLOCK)
        centred, scale = _normalised(value, eps, D, PARTS, BLOCK)
        normal = ()
        along = ()
        new_dw = ()
        new_db = ()
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        turned = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(PARTS):
            x = centred[i] * scale
            d = slope[i]
            if GATED:
                s = sigmoid(gate[i])
                silu = gate[i] * s
                along_gate = d * (x * w[i] + b[i]) * (s + silu * (1.0 - s))
                _store(dz, along_gate, i, first, dz_stride, rows, length, D, BLOCK)
                d *= silu
            new_dw = new_dw + (dw[i] + d * x,)
            new_db = new_db + (db[i] + d,)
            d *= w[i]
            total += d
            turned += d * x
            normal = normal + (x,)
            along = along + (d,)
        dw = new_dw
        db = new_db
        mean = tl.sum(total, 1)[:, None] * (1.0 / D)
        tilt = tl.sum(turned, 1)[:, None] * (1.0 / D)
        for i in tl.static_range(PARTS):
            _store(dy, scale * (along[i] - mean - normal[i] * tilt), i, first, D, rows, length, D, BLOCK)
    sums += tl.program_id(0) * (2 * D)
    for i in tl.static_range(PARTS):
        channels, there = _piece(i, D, BLOCK)
        tl.store(sums + channels, tl.sum(dw[i], 0), mask=there)
        tl.store(sums + D + channels, tl.sum(db[i], 0), mask=there)
