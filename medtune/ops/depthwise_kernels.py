"""The kernels of a depth-wise 3x3 convolution in Triton, forward and backward; `triton_depthwise.py` calls them.

A lane has two channels and a tile of ROWS x COLUMNS positions of one image; a program is SIDE tiles and a block of channels.
Taps and what they multiply are in registers: a position is loaded once for a tile and serves up to nine outputs. Loads
come AHEAD lines before their use, as compilers move none past a store. Sizes and strides are constants: all of a tile is at
fixed distances from one address, and no comparison is made that cannot fail.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medtune.ops.kernel_math import sigmoid


@triton.jit
def _tile(
    number, images, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Image, first row and first column of a tile, by its number, and whether there is such a tile."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    down: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    column = number % across * COLUMNS
    row = number // across % down * ROWS
    image = (number // (across * down)).to(tl.int64)
    return image, row.to(tl.int64), column.to(tl.int64), image < images


@triton.jit
def _on_map(
    live, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Whether position R, C of a tile at `row`, `column` is on the map."""
    if R < 0:
        live = live & (row > 0)
    elif R >= ROWS or HEIGHT % ROWS > 0:
        live = live & (row < HEIGHT - R)
    if C < 0:
        live = live & (column > 0)
    elif C >= COLUMNS or WIDTH % COLUMNS > 0:
        live = live & (column < WIDTH - C)
    return live


@triton.jit
def _line(
    at, live, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
    R: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Positions FIRST to before LAST of a tile's line R, zero off the map; ROW and COLUMN are strides."""
    line = ()
    for c in tl.static_range(FIRST, LAST):
        mask = _on_map(live, row, column, HEIGHT, WIDTH, R, c, ROWS, COLUMNS)
        line += (tl.load(at + (R * ROW + c * COLUMN), mask=mask, other=0.0),)
    return line


@triton.jit
def _wide(line):
    """A line's positions in float32."""
    wide = ()
    for i in tl.static_range(len(line)):
        wide += (line[i].to(tl.float32),)
    return wide


@triton.jit
def _taps(
    weight, bias, channel, CHANNELS: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """The nine weights, backwards if FLIP, and the bias; the same in all rows, for each lane to load what it needs."""
    at = tl.broadcast_to(channel, (SIDE, BLOCK))
    taps = ()
    for k in tl.static_range(9):
        taps += (tl.load(weight + (8 - k if FLIP else k) * CHANNELS + at, mask=at < CHANNELS, other=0.0),)
    start = tl.load(bias + at, mask=at < CHANNELS, other=0.0) if HAS_BIAS else tl.zeros((SIDE, BLOCK), tl.float32)
    return taps, start


@triton.jit
def _sum(start, above, here, below, taps, c: tl.constexpr):
    """The convolution's output at column c of the middle one of three lines, on top of `start`."""
    for j in tl.static_range(3):
        start = tl.fma(above[c + j], taps[j], start)
        start = tl.fma(here[c + j], taps[3 + j], start)
        start = tl.fma(below[c + j], taps[6 + j], start)
    return start


@triton.jit
def _add(total, slope, above, here, below, c: tl.constexpr):
    """The weights' and the bias' gradients with those of one output, at column c."""
    new = ()
    for j in tl.static_range(3):
        new += (tl.fma(slope, above[c + j], total[j]),)
    for j in tl.static_range(3):
        new += (tl.fma(slope, here[c + j], total[3 + j]),)
    for j in tl.static_range(3):
        new += (tl.fma(slope, below[c + j], total[6 + j]),)
    new += (total[9] + slope,)
    return new


@triton.jit(do_not_specialize=["images"])
def depthwise(
    x, weight, bias, y, images, x_image, y_image,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
    Y_ROW: tl.constexpr, Y_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr, BACK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (images, HEIGHT, WIDTH, CHANNELS), the SiLU of x' convolution, x being alike, both by strides, weight (9, CHANNELS).

    BACK: from the gradient of a convolution's output to that of its input, with weights turned about and no SiLU.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    side = tl.arange(0, SIDE)[:, None]
    taps, start = _taps(weight, bias, channel, CHANNELS, SIDE, BLOCK, HAS_BIAS, BACK)
    number = tl.program_id(0) // blocks * SIDE + side
    image, row, column, live = _tile(number, images, HEIGHT, WIDTH, ROWS, COLUMNS)
    if CHANNELS % BLOCK > 0:
        live = live & (channel < CHANNELS)
    at = x + (image * x_image + row * ROW + column * COLUMN) + channel
    to = y + (image * y_image + row * Y_ROW + column * Y_COLUMN) + channel
    loaded = ()
    for r in tl.static_range(-1, AHEAD):
        loaded += (_line(at, live, row, column, HEIGHT, WIDTH, ROW, COLUMN, r, -1, COLUMNS + 1, ROWS, COLUMNS),)
    above, here = _wide(loaded[0]), _wide(loaded[1])
    for r in tl.static_range(ROWS):
        if r + AHEAD <= ROWS:
            next_line = _line(
                at, live, row, column, HEIGHT, WIDTH, ROW, COLUMN, r + AHEAD, -1, COLUMNS + 1, ROWS, COLUMNS
            )
            loaded += (next_line,)
        below = _wide(loaded[r + 2])
        for c in tl.static_range(COLUMNS):
            out = _sum(start, above, here, below, taps, c)
            if not BACK:
                out *= sigmoid(out)
            mask = _on_map(live, row, column, HEIGHT, WIDTH, r, c, ROWS, COLUMNS)
            tl.store(to + (r * Y_ROW + c * Y_COLUMN), out, mask=mask)
        above, here = here, below


@triton.jit(do_not_specialize=["images", "each"])
def depthwise_backward(
    x, weight, bias, dy, ds, sums, images, each, x_image, dy_image,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
    DY_ROW: tl.constexpr, DY_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From dy, by strides: ds, like y, of what SiLU was taken of, and parts of the weights' and the bias' gradients.

    sums: (programs, 10, CHANNELS), the sums over `each` times SIDE tiles, the bias' after the nine weights'.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    program = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    side = tl.arange(0, SIDE)[:, None]
    taps, start = _taps(weight, bias, channel, CHANNELS, SIDE, BLOCK, HAS_BIAS, False)
    total = ()
    for _ in tl.static_range(10):
        total += (tl.zeros((SIDE, BLOCK), tl.float32),)
    for turn in range(each):
        number = (program * each + turn) * SIDE + side
        image, row, column, live = _tile(number, images, HEIGHT, WIDTH, ROWS, COLUMNS)
        if CHANNELS % BLOCK > 0:
            live = live & (channel < CHANNELS)
        at = x + (image * x_image + row * ROW + column * COLUMN) + channel
        of = dy + (image * dy_image + row * DY_ROW + column * DY_COLUMN) + channel
        to = ds + ((image * HEIGHT + row) * WIDTH + column) * CHANNELS + channel
        loaded, given = (), ()
        for r in tl.static_range(-1, AHEAD):
            loaded += (_line(at, live, row, column, HEIGHT, WIDTH, ROW, COLUMN, r, -1, COLUMNS + 1, ROWS, COLUMNS),)
            if r >= 0 and r + 1 < AHEAD:
                given += (_line(of, live, row, column, HEIGHT, WIDTH, DY_ROW, DY_COLUMN, r, 0, COLUMNS, ROWS, COLUMNS),)
        above, here = _wide(loaded[0]), _wide(loaded[1])
        for r in tl.static_range(ROWS):
            if r + AHEAD <= ROWS:
                next_line = _line(
                    at, live, row, column, HEIGHT, WIDTH, ROW, COLUMN, r + AHEAD, -1, COLUMNS + 1, ROWS, COLUMNS
                )
                loaded += (next_line,)
                next_given = _line(
                    of, live, row, column, HEIGHT, WIDTH, DY_ROW, DY_COLUMN, r + AHEAD - 1, 0, COLUMNS, ROWS, COLUMNS
                )
                given += (next_given,)
            below, slopes = _wide(loaded[r + 2]), _wide(given[r])
            for c in tl.static_range(COLUMNS):
                s = _sum(start, above, here, below, taps, c)
                open = sigmoid(s)
                slope = slopes[c] * (open + s * (open - open * open))
                mask = _on_map(live, row, column, HEIGHT, WIDTH, r, c, ROWS, COLUMNS)
                tl.store(to + (r * WIDTH + c) * CHANNELS, slope, mask=mask)
                total = _add(total, slope, above, here, below, c)
            above, here = here, below
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    for k in tl.static_range(10):
        tl.store(sums + (program * 10 + k) * CHANNELS + place, tl.sum(total[k], 0), mask=place < CHANNELS)
