"""The selective scan's kernels in Triton, forward and backward; `triton_scan.py` calls them.

One program is one warp: an image, a reading (group or direction) and 32 channels, a lane each. A chunk of positions is a
tile (T, 32) whose column is in one lane's registers, so that the recurrence over positions and the sums over states need
nothing of other lanes; only the sums over channels do. Each (position, state) costs one exp2 a pass. Positions stay
where they are on the map: a reading is an order to visit them in. Nothing is added atomically: same input, same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _row(tile, rows, i: tl.constexpr):
    """Row i of a float32 tile. As integers, where compilers drop `+ 0`: nothing of this is left but a register's name."""
    bits = tl.where(rows[:, None] == i, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _place(t, k, length, height, width, MAP: tl.constexpr):
    """Where on the map the t-th position of reading k is: rows, columns, both backwards (`to_directions`)."""
    if MAP:
        t = tl.where(k >= 2, length - 1 - t, t)
        inner = tl.where(k % 2 == 1, height, length)
        step = tl.where(k % 2 == 1, width, 1)
        # Exact for length < 2^20 (checked by the caller), and a third of an integer division's instructions.
        outer = ((t.to(tl.float32) + 0.5) * (1.0 / inner.to(tl.float32))).to(tl.int32)
        t = (t - outer * inner) * step + outer
    return t


@triton.jit
def _step_sizes(raw, bias, SOFTPLUS: tl.constexpr):
    """delta + bias, its softplus when asked for."""
    raw += bias[None, :]
    if SOFTPLUS:
        z = tl.exp2(-tl.abs(raw) * LOG2_E)
        # log(1 + z) / z for 0 < z <= 1, a least-squares polynomial with a relative error of 2e-7, also where 1 + z loses z.
        series = 0.0051058256 * z - 0.028991956
        series = series * z + 0.07738074
        series = series * z - 0.135905996
        series = series * z + 0.19071309
        series = series * z - 0.24833946
        series = series * z + 0.33317935
        series = series * z - 0.49999437
        raw = tl.maximum(raw, 0.0) + z * (series * z + 0.99999994)
    return raw


@triton.jit
def _softplus_slope(delta):
    """The derivative of softplus, of softplus' value: 1 - exp(-delta)."""
    small = delta * (1 - delta * (0.5 - delta * (0.16666667 - delta * 0.041666668)))
    return tl.where(delta < 0.03, small, 1 - tl.exp2(-delta * LOG2_E))


def _sums_by_tensor_cores(split: bool) -> str:
    """PTX for one warp: $1 to $16 and $17 to $32 are the rows of two tiles, a column in each lane; $0 is one row's sum.

    Lane l's is of tile l // 16 and of row 4 (l % 4) + 2 (l // 8 % 2) + l // 4 % 2. A matrix product takes four rows as its
    left operand (16 x 8: four registers in each of 8 x 4 lanes) and adds up four lanes each: its right operand sends the
    sums of product j to columns 2 j and 2 j + 1, so that four products fill one result. The eight sums of fours that
    are left are added by exchanges in which each lane gives away what it need not keep.
    TF32 has 11 bits: `split` adds what a value's upper 11 leave in a second product, for the precision of float32.
    """
    lines = [".reg .b32 lane, r, c<8>, v<4>, w<4>;", ".reg .f32 d<8>, k, g;", ".reg .pred q, p<3>;"]
    lines += ["mov.u32 lane, %laneid;", "shr.u32 r, lane, 2;"]
    for i in range(8):
        lines += [f"setp.eq.u32 q, r, {i};", f"selp.b32 c{i}, 0x3f800000, 0, q;"]
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    for tile in range(2):
        result = "{" + ", ".join(f"d{4 * tile + i}" for i in range(4)) + "}"
        lines += [f"mov.f32 d{4 * tile + i}, 0f00000000;" for i in range(4)]
        for j in range(4):
            right = f"{{c{2 * j}, c{2 * j + 1}}}"
            for i in range(4):
                source = f"${1 + 16 * tile + 4 * j + i}"
                lines += [f"and.b32 v{i}, {source}, 0xffffe000;" if split else f"mov.b32 v{i}, {source};"]
                lines += [f"sub.f32 w{i}, {source}, v{i};"] if split else []
            for left in "vw" if split else "v":
                lines += [f"{product} {result}, {{{left}0, {left}1, {left}2, {left}3}}, {right}, {result};"]
    for p, bit in enumerate((16, 8, 4)):
        lines += [f"and.b32 v0, lane, {bit};", f"setp.ne.u32 p{p}, v0, 0;"]

    def exchange(low: int, high: int, p: int, distance: int) -> list[str]:
        """d[low] of lanes without the bit, d[high] of those with it, and the same of the lanes at a distance: in d[low]."""
        keep = [f"selp.f32 k, d{high}, d{low}, p{p};", f"selp.f32 g, d{low}, d{high}, p{p};"]
        return [*keep, f"shfl.sync.bfly.b32 g, g, {distance}, 0x1f, 0xffffffff;", f"add.f32 d{low}, k, g;"]

    for i in range(4):
        lines += exchange(i, i + 4, 0, 16)
    lines += [*exchange(0, 1, 1, 8), *exchange(2, 3, 1, 8), *exchange(0, 2, 2, 4), "mov.f32 $0, d0;"]
    return "{\n" + "\n".join(lines) + "\n}"


SUMS = tl.constexpr(_sums_by_tensor_cores(split=False))
EXACT_SUMS = tl.constexpr(_sums_by_tensor_cores(split=True))
CONSTRAINTS = tl.constexpr("=f" + ",f" * 32)


@triton.jit
def _store_sums(out, apart, one, two, rows, MMA: tl.constexpr, EXACT: tl.constexpr):
    """Write the sums over channels of a tile (16, 32) to `out`, of another to `out + apart`."""
    if MMA:
        sums = tl.inline_asm_elementwise(
            EXACT_SUMS if EXACT else SUMS,
            CONSTRAINTS,
            [
                _row(one, rows, 0), _row(one, rows, 1), _row(one, rows, 2), _row(one, rows, 3),
                _row(one, rows, 4), _row(one, rows, 5), _row(one, rows, 6), _row(one, rows, 7),
                _row(one, rows, 8), _row(one, rows, 9), _row(one, rows, 10), _row(one, rows, 11),
                _row(one, rows, 12), _row(one, rows, 13), _row(one, rows, 14), _row(one, rows, 15),
                _row(two, rows, 0), _row(two, rows, 1), _row(two, rows, 2), _row(two, rows, 3),
                _row(two, rows, 4), _row(two, rows, 5), _row(two, rows, 6), _row(two, rows, 7),
                _row(two, rows, 8), _row(two, rows, 9), _row(two, rows, 10), _row(two, rows, 11),
                _row(two, rows, 12), _row(two, rows, 13), _row(two, rows, 14), _row(two, rows, 15),
            ],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        lane = tl.arange(0, 32)
        row = 4 * (lane % 4) + 2 * (lane // 8 % 2) + lane // 4 % 2
        tl.store(out + row + tl.where(lane < 16, 0, apart), sums)
    else:
        tl.store(out + rows, tl.sum(one, 1))
        tl.store(out + apart + rows, tl.sum(two, 1))


@triton.jit(do_not_specialize=["zero"])
def scan_forward(
    u, delta, A, mix, skip, bias, y, states,
    u_k, u_b, u_p, delta_k, delta_b, delta_p,
    images, length, channels, padded, height, width, zero,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, MAP: tl.constexpr, KEEP: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (K, images, length, channels) of u, delta (alike, by strides), A (K, N, channels), mix (K, images, 2 N, padded).

    Channels lie side by side. That zero is 0 is not specialised: addresses seem unaligned, so that a lane loads no more
    than a channel of a position; were loads made wider, a tile's layout would follow, with positions over several lanes.
    mix is B over C, in the order of each reading. states (K, images, chunks, N, channels): what enters each chunk, kept
    for the backward pass (KEEP), or one chunk's, overwritten.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = lane + zero
    live = lane < channels
    reading = tl.program_id(1)
    k, b = reading // images, (reading % images).to(tl.int64)
    rows = tl.arange(0, T)
    chunks = tl.cdiv(length, T)
    u += k.to(tl.int64) * u_k + b * u_b
    delta += k.to(tl.int64) * delta_k + b * delta_b
    whole = reading.to(tl.int64)
    y += whole * length * channels
    mix += whole * 2 * N * padded
    states += whole * N * channels * (chunks if KEEP else 1)
    A += k * N * channels
    offset = tl.load(bias + k * channels + lane, mask=live, other=0.0) if HAS_BIAS else tl.zeros((BLOCK,), tl.float32)
    for chunk in range(chunks):
        t = chunk * T + rows
        p = _place(t, k, length, height, width, MAP)
        mask = (t < length)[:, None] & live[None, :]
        value = tl.load(u + p[:, None] * u_p + column[None, :], mask=mask, other=0.0).to(tl.float32)
        raw = tl.load(delta + p[:, None] * delta_p + column[None, :], mask=mask, other=0.0).to(tl.float32)
        step = _step_sizes(raw, offset, SOFTPLUS)
        x = step * value
        if HAS_SKIP:
            out = value * tl.load(skip + k * channels + lane, mask=live, other=0.0)[None, :]
        else:
            out = tl.zeros((T, BLOCK), tl.float32)
        enter = states + (chunk * N * channels if KEEP else 0) + lane
        leave = enter + (N * channels if KEEP else 0)
        for n in range(N):
            decay = tl.exp2(step * (tl.load(A + n * channels + lane, mask=live, other=0.0) * LOG2_E)[None, :])
            pushed = x * tl.load(mix + n * padded + t)[:, None]
            h = tl.load(enter + n * channels, mask=live & (chunk > 0), other=0.0)
            held = decay
            for i in tl.static_range(T):
                h = _row(decay, rows, i) * h + _row(pushed, rows, i)
                held = tl.where(rows[:, None] == i, h[None, :], held)
            out += held * tl.load(mix + (N + n) * padded + t)[:, None]
            tl.store(leave + n * channels, h, mask=live & (chunk + 1 < chunks))
        tl.store(y + p[:, None] * channels + column[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["zero"])
def scan_backward(
    u, delta, A, mix, skip, bias, states, dy, du, ddelta, dA, dmix, dskip, dbias, carry,
    u_k, u_b, u_p, delta_k, delta_b, delta_p, dy_k, dy_b, dy_p,
    ddelta_k, ddelta_b, ddelta_p,
    images, length, channels, padded, height, width, zero,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, MAP: tl.constexpr,
    MMA: tl.constexpr, EXACT: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of all that `scan_forward` reads, from dy, shaped like y, by strides.

    du: like y; ddelta: likewise, by strides. dA (K, images, N, channels), dskip, dbias (K, images, channels): one image's
    each, to be summed. dmix (blocks of channels, K, images, 2 N, padded): one block's each, to be summed. carry, like dA:
    working memory. MMA: add up channels by tensor cores, EXACT: to float32's precision.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = lane + zero
    live = lane < channels
    reading = tl.program_id(1)
    k, b = reading // images, (reading % images).to(tl.int64)
    rows = tl.arange(0, T)
    chunks = tl.cdiv(length, T)
    u += k.to(tl.int64) * u_k + b * u_b
    delta += k.to(tl.int64) * delta_k + b * delta_b
    dy += k.to(tl.int64) * dy_k + b * dy_b
    whole = reading.to(tl.int64)
    du += whole * length * channels
    ddelta += k.to(tl.int64) * ddelta_k + b * ddelta_b
    mix += whole * 2 * N * padded
    dmix += (whole + tl.program_id(0).to(tl.int64) * tl.num_programs(1)) * 2 * N * padded
    states += whole * N * channels * chunks + lane
    A += k * N * channels + lane
    dA += whole * N * channels + lane
    carry += whole * N * channels + lane
    offset = tl.load(bias + k * channels + lane, mask=live, other=0.0) if HAS_BIAS else tl.zeros((BLOCK,), tl.float32)
    through = tl.load(skip + k * channels + lane, mask=live, other=0.0) if HAS_SKIP else tl.zeros((BLOCK,), tl.float32)
    sum_skip = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * T + rows
        p = _place(t, k, length, height, width, MAP)
        mask = (t < length)[:, None] & live[None, :]
        value = tl.load(u + p[:, None] * u_p + column[None, :], mask=mask, other=0.0).to(tl.float32)
        raw = tl.load(delta + p[:, None] * delta_p + column[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + p[:, None] * dy_p + column[None, :], mask=mask, other=0.0).to(tl.float32)
        step = _step_sizes(raw, offset, SOFTPLUS)
        x = step * value
        dx = tl.zeros((T, BLOCK), tl.float32)
        by_decay = tl.zeros((T, BLOCK), tl.float32)
        entered = live & (chunk > 0)
        left = live & (back > 0)
        for n in range(N):
            rate = tl.load(A + n * channels, mask=live, other=0.0) * LOG2_E
            B = tl.load(mix + n * padded + t)[:, None]
            C = tl.load(mix + (N + n) * padded + t)[:, None]
            h = tl.load(states + (chunk * N + n) * channels, mask=entered, other=0.0)
            g = tl.load(carry + n * channels, mask=left, other=0.0)
            sum_A = tl.load(dA + n * channels, mask=left, other=0.0)
            decay = tl.exp2(step * rate[None, :])
            pushed = x * B
            reach = grad * C
            held = decay
            for i in tl.static_range(T):
                h = _row(decay, rows, i) * h + _row(pushed, rows, i)
                held = tl.where(rows[:, None] == i, h[None, :], held)
            back_held = decay
            for j in tl.static_range(T):
                g = g + _row(reach, rows, T - 1 - j)
                back_held = tl.where(rows[:, None] == T - 1 - j, g[None, :], back_held)
                g = _row(decay, rows, T - 1 - j) * g
            tl.store(carry + n * channels, g, mask=entered)
            _store_sums(dmix + n * padded + chunk * T, N * padded, back_held * x, grad * held, rows, MMA, EXACT)
            dx += back_held * B
            decayed = (held - pushed) * back_held
            by_decay += decayed * rate[None, :]
            tl.store(dA + n * channels, sum_A + tl.sum(decayed * step, 0), mask=live)
        dvalue = step * dx + grad * through[None, :]
        dstep = value * dx + by_decay * LN_2
        if SOFTPLUS:
            dstep *= _softplus_slope(step)
        sum_skip += tl.sum(grad * value, 0)
        sum_bias += tl.sum(dstep, 0)
        tl.store(du + p[:, None] * channels + column[None, :], dvalue, mask=mask)
        tl.store(ddelta + p[:, None] * ddelta_p + column[None, :], dstep, mask=mask)
    if HAS_SKIP:
        tl.store(dskip + whole * channels + lane, sum_skip, mask=live)
    if HAS_BIAS:
        tl.store(dbias + whole * channels + lane, sum_bias, mask=live)


@triton.jit(do_not_specialize=["source_c"])
def mix_readings(
    source, mix, source_b, source_p, source_k, source_c,
    images, length, padded, height, width,
    BACK: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """mix (K, images, WIDTH, padded), zero past the end, of source (images, length, K, WIDTH) by strides; or BACK.

    COLUMNS: the power of two that holds WIDTH.
    """
    reading = tl.program_id(1)
    k, b = reading // images, (reading % images).to(tl.int64)
    t = tl.program_id(0) * T + tl.arange(0, T)
    column = tl.arange(0, COLUMNS)
    p = _place(t, k, length, height, width, True)
    kept = (column < WIDTH)[None, :]
    inside = (t < length)[:, None] & kept
    source += b * source_b + k * source_k + p[:, None] * source_p + column[None, :] * source_c
    mix += reading.to(tl.int64) * WIDTH * padded + column[None, :] * padded + t[:, None]
    if BACK:
        tl.store(source, tl.load(mix, mask=inside, other=0.0), mask=inside)
    else:
        tl.store(mix, tl.load(source, mask=inside, other=0.0).to(tl.float32), mask=(t < padded)[:, None] & kept)
