"""The selective scan's kernels in Triton, forward and backward; `triton_scan.py` calls them.

One program is an image, a reading (group or direction) and 32 channels, a lane each; its G warps have N / G states each. A
chunk of T positions is a tile (T, G, 32) whose column is in one lane's registers, so that the recurrence over positions
needs nothing of other lanes, and what is carried from chunk to chunk stays in registers. What does not depend on the state
is a tile (T, 32) with T / G rows a warp: computed once, shared out through shared memory, as sums over states come back.
Only sums over channels cross lanes. Each (position, state) costs one exp2 a pass. Positions stay where they are on the
map: a reading is an order to visit them in. Nothing is added atomically: same input, same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medtune.ops.kernel_math import LOG2_E

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _row(tile, rows, i: tl.constexpr):
    """Row i of a float32 tile. As integers, where compilers drop `+ 0`: nothing of this is left but a register's name."""
    bits = tl.where(rows[:, None, None] == i, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _with_row(tile, row, rows, i: tl.constexpr):
    """The tile with another row i."""
    return tl.where(rows[:, None, None] == i, row[None, :, :], tile)


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
    """PTX for one warp: $1 to $8 and $9 to $16 are the rows of two tiles, a column in each lane; $0 is one row's sum.

    Lane l's is of tile l // 2 % 2 and of row 4 (l % 2) + 2 (l // 8 % 2) + l // 16, in two lanes each. A matrix product takes
    four rows as its left operand (16 x 8: four registers in each of 8 x 4 lanes) and adds up four lanes each: its right
    operand sends the sums of product j to columns 2 j and 2 j + 1, so that four products fill one result. The eight sums of
    fours that are left are added by exchanges in which each lane gives away what it need not keep.
    TF32 has 11 bits: `split` adds what a value's upper 11 leave in a second product, for the precision of float32.
    """
    lines = [".reg .b32 lane, r, c<8>, v<4>, w<4>;", ".reg .f32 d<4>, k, g;", ".reg .pred q, p<2>;"]
    lines += ["mov.u32 lane, %laneid;", "shr.u32 r, lane, 2;"]
    for i in range(8):
        lines += [f"setp.eq.u32 q, r, {i};", f"selp.b32 c{i}, 0x3f800000, 0, q;"]
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {d0, d1, d2, d3}"
    lines += [f"mov.f32 d{i}, 0f00000000;" for i in range(4)]
    for j in range(4):
        for i in range(4):
            source = f"${1 + 4 * j + i}"
            lines += [f"and.b32 v{i}, {source}, 0xffffe000;" if split else f"mov.b32 v{i}, {source};"]
            lines += [f"sub.f32 w{i}, {source}, v{i};"] if split else []
        for left in "vw" if split else "v":
            lines += [f"{product}, {{{left}0, {left}1, {left}2, {left}3}}, {{c{2 * j}, c{2 * j + 1}}}, {{d0, d1, d2, d3}};"]
    for p, bit in enumerate((16, 8)):
        lines += [f"and.b32 v0, lane, {bit};", f"setp.ne.u32 p{p}, v0, 0;"]
    for low, high, p, distance in ((0, 2, 0, 16), (1, 3, 0, 16), (0, 1, 1, 8)):
        # d[low] of lanes without the bit, d[high] of those with it, and the same of the lanes at a distance: in d[low].
        lines += [f"selp.f32 k, d{high}, d{low}, p{p};", f"selp.f32 g, d{low}, d{high}, p{p};"]
        lines += [f"shfl.sync.bfly.b32 g, g, {distance}, 0x1f, 0xffffffff;", f"add.f32 d{low}, k, g;"]
    lines += ["shfl.sync.bfly.b32 g, d0, 4, 0x1f, 0xffffffff;", "add.f32 $0, d0, g;"]
    return "{\n" + "\n".join(lines) + "\n}"


SUMS = tl.constexpr(_sums_by_tensor_cores(split=False))
EXACT_SUMS = tl.constexpr(_sums_by_tensor_cores(split=True))
CONSTRAINTS = tl.constexpr("=f" + ",f" * 16)


@triton.jit
def _sums_places(out, warp, rows, MMA: tl.constexpr, N: tl.constexpr, T: tl.constexpr):
    """Where the sums over channels of each warp's first state go in a chunk: as `_sums` leaves them in lanes, or (T, G)."""
    if MMA:
        lane = tl.arange(0, 32)
        place = 4 * (lane % 2) + 2 * (lane // 8 % 2) + lane // 16 + lane // 2 % 2 * (N * T)
        # Said to be contiguous, so that lanes stay where they are: else sums would change lanes before they are stored.
        at = out + tl.max_contiguous(warp[:, None] * T + place[None, :], [1, 32])
    else:
        at = out + warp[None, :] * T + rows[:, None]
    return at


@triton.jit
def _sums(one, two, rows, EXACT: tl.constexpr):
    """The sums over channels of two tiles (8, G, 32), each in two lanes: (G, 32)."""
    return tl.inline_asm_elementwise(
        EXACT_SUMS if EXACT else SUMS,
        CONSTRAINTS,
        [
            _row(one, rows, 0), _row(one, rows, 1), _row(one, rows, 2), _row(one, rows, 3),
            _row(one, rows, 4), _row(one, rows, 5), _row(one, rows, 6), _row(one, rows, 7),
            _row(two, rows, 0), _row(two, rows, 1), _row(two, rows, 2), _row(two, rows, 3),
            _row(two, rows, 4), _row(two, rows, 5), _row(two, rows, 6), _row(two, rows, 7),
        ],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _tile(x, x_p, p, column, mask):
    """x (positions, channels) at places p, zero where masked: (T, BLOCK).

    Float32 at once, also of what waits for the next chunk: a conversion later is where compilers would share a tile out
    among warps, and have all that follows it computed by each.
    """
    return tl.load(x + p[:, None] * x_p + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _touch(mix, chunk, chunks, N: tl.constexpr, M: tl.constexpr, G: tl.constexpr, T: tl.constexpr):
    """Load a float (32 G of them) of every 32 bytes of a chunk's B and C, which brings them into the L1 cache.

    They are needed in every lane, too many for registers: what asks for them a chunk ahead has to be loads of its own. The
    values are worth nothing, but must be used, or compilers drop the loads.
    """
    at = tl.arange(0, 32 * G) * max(1, M * T // 16)
    return tl.load(mix + chunk * (2 * N * T) + at, mask=(at < 2 * N * T) & (chunk >= 0) & (chunk < chunks), other=0.0)


@triton.jit
def _pretend(out, worthless, zero):
    """Store what `_touch` loaded nowhere, which compilers cannot know."""
    at = tl.arange(0, worthless.shape[0])
    tl.store(out + at, worthless, mask=at < zero)


@triton.jit
def _B_and_C(at, warp, m: tl.constexpr, N: tl.constexpr, G: tl.constexpr, T: tl.constexpr):
    """B and C of each warp's m-th state, (T, G, 1) each, of where its first lies in a chunk of mix."""
    mask = (m * G + warp < N)[None, :]
    B = tl.load(at + m * G * T, mask=mask, other=0.0)
    C = tl.load(at + (N + m * G) * T, mask=mask, other=0.0)
    return B[:, :, None], C[:, :, None]


@triton.jit
def _fence(warp):
    """What is loaded after it is asked for after what is loaded before it: compilers may otherwise choose.

    A lane waits for its loads by six counters, which loads from far away and from the L1 cache should not share.
    """
    tl.inline_asm_elementwise(
        "{ bar.warp.sync 0xffffffff; mov.b32 $0, $1; }", "=r,r", [warp], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _over_warps(tile, T: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of G warps' tiles (T, G, BLOCK). Added to zeros, whose rows lie in different warps, as the result's do."""
    return tl.sum(tl.trans(tile, (1, 0, 2)) + tl.zeros((G, T, BLOCK), tl.float32), 0)


@triton.jit(do_not_specialize=["images", "length", "height", "width", "zero"])
def scan_forward(
    u, delta, A, mix, skip, bias, y, states,
    u_k, u_b, u_p, delta_k, delta_b, delta_p,
    images, length, channels, height, width, zero,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, MAP: tl.constexpr, KEEP: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, G: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (K, images, length, channels) of u, delta (alike, by strides), A (K, N, channels), mix (K, images, chunks, 2 N, T).

    Channels lie side by side. That zero is 0 is not specialised: addresses seem unaligned, so that a lane loads no more
    than a channel of a position; were loads made wider, a tile's layout would follow, with positions over several lanes.
    The next chunk's tiles are asked for before a chunk is computed.
    mix is B over C, in the order of each reading. states (K, images, blocks of channels, chunks, N, BLOCK): what
    enters each chunk but the first, kept for the backward pass (KEEP). G warps have M states each, M G >= N.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = lane + zero
    live = lane < channels
    reading = tl.program_id(1)
    k, b = reading // images, (reading % images).to(tl.int64)
    rows, turns, warp = tl.arange(0, T), tl.arange(0, M), tl.arange(0, G)
    chunks = tl.cdiv(length, T)
    u += k.to(tl.int64) * u_k + b * u_b
    delta += k.to(tl.int64) * delta_k + b * delta_b
    whole = reading.to(tl.int64)
    y += whole * length * channels
    mix += whole * chunks * 2 * N * T
    states += (whole * tl.num_programs(0) + tl.program_id(0)) * chunks * N * BLOCK + tl.arange(0, BLOCK)[None, :]
    A += k * N * channels + lane[None, :]
    offset = tl.load(bias + k * channels + lane, mask=live, other=0.0) if HAS_BIAS else tl.zeros((BLOCK,), tl.float32)
    through = tl.load(skip + k * channels + lane, mask=live, other=0.0) if HAS_SKIP else tl.zeros((BLOCK,), tl.float32)
    rates = tl.zeros((M, G, BLOCK), tl.float32)
    for m in tl.static_range(M):
        n = m * G + warp
        rate = tl.load(A + n[:, None] * channels, mask=(n < N)[:, None] & live[None, :], other=0.0)
        rates = _with_row(rates, rate * LOG2_E, turns, m)
    state = tl.zeros((M, G, BLOCK), tl.float32)
    next_p = _place(rows, k, length, height, width, MAP)
    next_mask = (rows < length)[:, None] & live[None, :]
    next_u = _tile(u, u_p, next_p, column, next_mask)
    next_delta = _tile(delta, delta_p, next_p, column, next_mask)
    touched = _touch(mix, 0, chunks, N, M, G, T)
    worthless = touched
    first = mix + (warp * T)[None, :] + rows[:, None]
    states += (warp * BLOCK)[:, None]
    for chunk in range(chunks):
        worthless = tl.maximum(worthless, touched)
        touched = _touch(mix, chunk + 1, chunks, N, M, G, T)
        p, mask, value, raw = next_p, next_mask, next_u, next_delta
        t = (chunk + 1) * T + rows
        next_p = _place(t, k, length, height, width, MAP)
        next_mask = (t < length)[:, None] & live[None, :]
        next_u = _tile(u, u_p, next_p, column, next_mask)
        next_delta = _tile(delta, delta_p, next_p, column, next_mask)
        at = first + chunk * (2 * N * T)
        next_B, next_C = _B_and_C(at, warp, 0, N, G, T)  # before the steps, which warps wait for each other to share
        step = _step_sizes(raw, offset, SOFTPLUS)
        steps, x = step[:, None, :], (step * value)[:, None, :]
        out = tl.zeros((T, G, BLOCK), tl.float32)
        for m in tl.static_range(M):
            B, C = next_B, next_C
            if m + 1 < M:
                next_B, next_C = _B_and_C(at, warp, m + 1, N, G, T)
            decay = tl.exp2(steps * _row(rates, turns, m)[None, :, :])
            pushed = x * B
            h = _row(state, turns, m)
            held = decay
            for i in tl.static_range(T):
                h = _row(decay, rows, i) * h + _row(pushed, rows, i)
                held = _with_row(held, h, rows, i)
            out += held * C
            state = _with_row(state, h, turns, m)
        if KEEP:
            leave = states + (chunk + 1) * (N * BLOCK)
            for m in tl.static_range(M):
                kept = (m * G + warp < N)[:, None] & live[None, :] & (chunk + 1 < chunks)
                tl.store(leave + m * G * BLOCK, _row(state, turns, m), mask=kept)
        total = _over_warps(out, T, G, BLOCK) + value * through[None, :]
        tl.store(y + p[:, None] * channels + column[None, :], total, mask=mask)
    _pretend(y, worthless, zero)


@triton.jit
def _states(kept, chunk, live, turns, warp, N: tl.constexpr, M: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):
    """What enters a chunk, as `scan_forward` kept it, nothing before the first: (M, G, BLOCK)."""
    states = tl.zeros((M, G, BLOCK), tl.float32)
    enter = kept + chunk * (N * BLOCK)
    for m in tl.static_range(M):
        mask = (m * G + warp < N)[:, None] & live[None, :] & (chunk > 0)
        state = tl.load(enter + m * G * BLOCK, mask=mask, other=0.0).to(tl.float32)
        states = _with_row(states, state, turns, m)
    return states


@triton.jit(do_not_specialize=["images", "length", "height", "width", "zero"])
def scan_backward(
    u, delta, A, mix, skip, bias, states, dy, du, ddelta, sums, dmix,
    u_k, u_b, u_p, delta_k, delta_b, delta_p, dy_k, dy_b, dy_p,
    ddelta_k, ddelta_b, ddelta_p,
    images, length, channels, height, width, zero,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, MAP: tl.constexpr,
    MMA: tl.constexpr, EXACT: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, G: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of all that `scan_forward` reads, from dy, shaped like y, by strides.

    du: like y; ddelta: likewise, by strides. sums (K, images, N + 2, channels): dA, then dskip and dbias, one image's
    each, to be summed. dmix (blocks of channels, K, images, chunks, 2 N, T): one block's each, in any type, to be
    summed. MMA: add up channels by tensor cores, EXACT: to float32's precision.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = lane + zero
    live = lane < channels
    reading = tl.program_id(1)
    k, b = reading // images, (reading % images).to(tl.int64)
    rows, turns, warp = tl.arange(0, T), tl.arange(0, M), tl.arange(0, G)
    chunks = tl.cdiv(length, T)
    u += k.to(tl.int64) * u_k + b * u_b
    delta += k.to(tl.int64) * delta_k + b * delta_b
    dy += k.to(tl.int64) * dy_k + b * dy_b
    whole = reading.to(tl.int64)
    du += whole * length * channels
    ddelta += k.to(tl.int64) * ddelta_k + b * ddelta_b
    mix += whole * chunks * 2 * N * T
    dmix += (whole + tl.program_id(0).to(tl.int64) * tl.num_programs(1)) * chunks * 2 * N * T
    states += (whole * tl.num_programs(0) + tl.program_id(0)) * chunks * N * BLOCK + tl.arange(0, BLOCK)[None, :]
    A += k * N * channels + lane[None, :]
    sums += whole * (N + 2) * channels
    offset = tl.load(bias + k * channels + lane, mask=live, other=0.0) if HAS_BIAS else tl.zeros((BLOCK,), tl.float32)
    through = tl.load(skip + k * channels + lane, mask=live, other=0.0) if HAS_SKIP else tl.zeros((BLOCK,), tl.float32)
    rates = tl.zeros((M, G, BLOCK), tl.float32)
    for m in tl.static_range(M):
        n = m * G + warp
        rate = tl.load(A + n[:, None] * channels, mask=(n < N)[:, None] & live[None, :], other=0.0)
        rates = _with_row(rates, rate * LOG2_E, turns, m)
    carry = tl.zeros((M, G, BLOCK), tl.float32)
    sum_A = tl.zeros((M, G, BLOCK), tl.float32)
    sum_skip = tl.zeros((T, BLOCK), tl.float32)
    sum_bias = tl.zeros((T, BLOCK), tl.float32)
    t = (chunks - 1) * T + rows
    next_p = _place(t, k, length, height, width, MAP)
    next_mask = (t < length)[:, None] & live[None, :]
    next_u = _tile(u, u_p, next_p, column, next_mask)
    next_delta = _tile(delta, delta_p, next_p, column, next_mask)
    next_dy = _tile(dy, dy_p, next_p, column, next_mask)
    states += (warp * BLOCK)[:, None]
    next_states = _states(states, chunks - 1, live, turns, warp, N, M, G, BLOCK)
    first = mix + (warp * T)[None, :] + rows[:, None]
    first_of_two = (tl.arange(0, 32) // 4 % 2 == 0)[None, :]
    dmix_first = _sums_places(dmix, warp, rows, MMA, N, T)
    touched = _touch(mix, chunks - 1, chunks, N, M, G, T)
    worthless = touched
    for back in range(chunks):
        chunk = chunks - 1 - back
        p, mask, value, raw, grad = next_p, next_mask, next_u, next_delta, next_dy
        entered = next_states
        at = first + chunk * (2 * N * T)
        next_B, next_C = _B_and_C(at, warp, 0, N, G, T)
        step = _step_sizes(raw, offset, SOFTPLUS)
        steps, x, grads = step[:, None, :], (step * value)[:, None, :], grad[:, None, :]
        dx = tl.zeros((T, G, BLOCK), tl.float32)
        by_decay = tl.zeros((T, G, BLOCK), tl.float32)
        sums_at = dmix_first + chunk * (2 * N * T)
        for m in tl.static_range(M):
            B, C = next_B, next_C
            if m + 1 < M:
                next_B, next_C = _B_and_C(at, warp, m + 1, N, G, T)
            rate = _row(rates, turns, m)
            decay = tl.exp2(steps * rate[None, :, :])
            pushed = x * B
            reach = grads * C
            h = _row(entered, turns, m)
            held, entering = decay, decay
            for i in tl.static_range(T):
                entering = _with_row(entering, h, rows, i)
                h = _row(decay, rows, i) * h + _row(pushed, rows, i)
                held = _with_row(held, h, rows, i)
            g = _row(carry, turns, m) + _row(reach, rows, T - 1)
            back_held = _with_row(decay, g, rows, T - 1)
            for j in tl.static_range(1, T):
                # Said to be one operation, as the other product could be the one that is fused: a chain twice as long.
                g = tl.fma(_row(decay, rows, T - j), g, _row(reach, rows, T - 1 - j))
                back_held = _with_row(back_held, g, rows, T - 1 - j)
            carry = _with_row(carry, _row(decay, rows, 0) * g, turns, m)
            if m == M - 1:
                if MMA:
                    _fence(warp)  # behind B and C, which would wait for these as well
                worthless = tl.maximum(worthless, touched)
                touched = _touch(mix, chunks - 2 - back, chunks, N, M, G, T)
                next_p = _place((chunk - 1) * T + rows, k, length, height, width, MAP)
                next_mask = (rows < chunk * T)[:, None] & live[None, :]
                next_u = _tile(u, u_p, next_p, column, next_mask)
                next_delta = _tile(delta, delta_p, next_p, column, next_mask)
                next_dy = _tile(dy, dy_p, next_p, column, next_mask)
                next_states = _states(states, chunk - 1, live, turns, warp, N, M, G, BLOCK)
            by_B, by_C = back_held * x, grads * held
            there = m * G + warp < N
            if MMA:
                tl.store(sums_at + m * G * T, _sums(by_B, by_C, rows, EXACT), mask=there[:, None] & first_of_two)
            else:
                tl.store(sums_at + m * G * T, tl.sum(by_B, 2), mask=there[None, :])
                tl.store(sums_at + (N + m * G) * T, tl.sum(by_C, 2), mask=there[None, :])
            dx += back_held * B
            decayed = back_held * (decay * entering)
            by_decay += decayed * rate[None, :, :]
            sum_A = _with_row(sum_A, _row(sum_A, turns, m) + tl.sum(decayed * steps, 0), turns, m)
        dx_all = _over_warps(dx, T, G, BLOCK)
        by_decay_all = _over_warps(by_decay, T, G, BLOCK)
        dvalue = step * dx_all + grad * through[None, :]
        dstep = value * dx_all + by_decay_all * LN_2
        if SOFTPLUS:
            dstep *= _softplus_slope(step)
        sum_skip += grad * value
        sum_bias += dstep
        tl.store(du + p[:, None] * channels + column[None, :], dvalue, mask=mask)
        tl.store(ddelta + p[:, None] * ddelta_p + column[None, :], dstep, mask=mask)
    for m in tl.static_range(M):
        n = m * G + warp
        tl.store(
            sums + n[:, None] * channels + lane[None, :], _row(sum_A, turns, m), mask=(n < N)[:, None] & live[None, :]
        )
    _pretend(dmix, worthless, zero)
    if HAS_SKIP:
        tl.store(sums + N * channels + lane, tl.sum(sum_skip, 0), mask=live)
    if HAS_BIAS:
        tl.store(sums + (N + 1) * channels + lane, tl.sum(sum_bias, 0), mask=live)


@triton.jit(do_not_specialize=["source_c", "images", "length", "chunks", "height", "width"])
def mix_readings(
    source, mix, source_b, source_p, source_k, source_c,
    images, length, chunks, height, width,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mix (K, images, chunks, WIDTH, T) in float32, zero past the end, of source (images, length, K, WIDTH) by strides.

    COLUMNS: the power of two that holds WIDTH. BLOCK: a program's positions.
    """
    reading = tl.program_id(1)
    k, b = reading // images, (reading % images).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    p = _place(t, k, length, height, width, True)
    kept = (column < WIDTH)[None, :]
    source += b * source_b + k * source_k + p[:, None] * source_p + column[None, :] * source_c
    mix += reading.to(tl.int64) * chunks * WIDTH * T + (t // T * (WIDTH * T) + t % T)[:, None] + column[None, :] * T
    value = tl.load(source, mask=(t < length)[:, None] & kept, other=0.0)
    tl.store(mix, value.to(tl.float32), mask=(t < chunks * T)[:, None] & kept)


@triton.jit(do_not_specialize=["images", "length", "chunks", "blocks", "height", "width"])
def unmix_readings(
    dmix, out, out_b, out_p, out_k, images, length, chunks, blocks, height, width,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out (images, length, K, WIDTH), by strides: the sum of dmix (blocks, K, images, chunks, WIDTH, T).

    CHUNKS: a program's. Read as dmix lies and written as out does: a tile is turned in between.
    """
    reading = tl.program_id(1)
    k, b = reading // images, (reading % images).to(tl.int64)
    first = tl.program_id(0) * CHUNKS
    chunk, column, row = tl.arange(0, CHUNKS), tl.arange(0, COLUMNS), tl.arange(0, T)
    at = (chunk * (WIDTH * T))[:, None, None] + (column * T)[None, :, None] + row[None, None, :]
    there = (first + chunk < chunks)[:, None, None] & (column < WIDTH)[None, :, None] & (row < T)[None, None, :]
    dmix += (reading.to(tl.int64) * chunks + first) * (WIDTH * T) + at
    total = tl.zeros((CHUNKS, COLUMNS, T), tl.float32)
    for _ in range(blocks):
        total += tl.load(dmix, mask=there, other=0.0).to(tl.float32)
        dmix += tl.num_programs(1).to(tl.int64) * chunks * (WIDTH * T)
    total = tl.reshape(tl.permute(total, (0, 2, 1)), (CHUNKS * T, COLUMNS))
    t = first * T + tl.arange(0, CHUNKS * T)
    p = _place(t, k, length, height, width, True)
    out += b * out_b + p[:, None] * out_p + k * out_k + column[None, :]
    tl.store(out, total, mask=(t < length)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def add_up(each, total, count, K: tl.constexpr, BLOCK: tl.constexpr):
    """total (count) of each (K, count)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    values = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        values += tl.load(each + tl.cast(count, tl.int64) * k + at, mask=there, other=0.0).to(tl.float32)
    tl.store(total + at, values, mask=there)
