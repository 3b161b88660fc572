"""A warp of 32 lanes in NumPy, for the few PTX instructions that the scan's sums over channels use."""

from __future__ import annotations

import re

import numpy as np

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def run(asm: str, arguments: list[np.ndarray]) -> np.ndarray:
    """$0 in each lane, of $1, $2, ... (32,) float32."""
    values: dict[str, np.ndarray] = {f"${i + 1}": v.astype(np.float32) for i, v in enumerate(arguments)}
    for line in asm.strip("{}\n").split("\n"):
        name, _, rest = line.strip().rstrip(";").partition(" ")
        if name == ".reg":
            continue
        if name.startswith("mma"):
            assert name == "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
            out, left, right, add = (re.findall(r"[\w$]+", part) for part in re.findall(r"\{(.*?)\}", rest))
            result = product(*([values[r] for r in part] for part in (left, right, add)))
            values |= dict(zip(out, result, strict=True))
            continue
        into, *operands = (part.strip() for part in rest.split(","))
        read = [literal(o) if o not in values else values[o] for o in operands]
        values[into] = step(name, read)
    return values["$0"]


def literal(text: str) -> np.ndarray:
    """A lane number, an integer or bits of a float."""
    if text == "%laneid":
        return LANE.astype(np.uint32)
    if text.startswith("0f"):
        return bits(int(text[2:], 16)).view(np.float32)
    return bits(int(text, 0))


def bits(number: int) -> np.ndarray:
    return np.full(32, number, np.uint32)


def step(name: str, read: list[np.ndarray]) -> np.ndarray:
    raw = [v.view(np.uint32) if v.dtype == np.float32 else v for v in read]
    if name.startswith("shfl.sync.bfly"):
        assert raw[2][0] == 0x1F and raw[3][0] == 0xFFFFFFFF
        return read[0][LANE ^ int(raw[1][0])]
    if name.startswith("mov"):
        return read[0]
    if name.startswith("selp"):
        return np.where(read[2], raw[0], raw[1]).view(read[0].dtype)
    return {
        "shr.u32": lambda: raw[0] >> raw[1],
        "and.b32": lambda: (raw[0] & raw[1]).view(read[0].dtype),
        "setp.eq.u32": lambda: raw[0] == raw[1],
        "setp.ne.u32": lambda: raw[0] != raw[1],
        "sub.f32": lambda: read[0] - read[1],
        "add.f32": lambda: read[0] + read[1],
    }[name]()


def product(left: list[np.ndarray], right: list[np.ndarray], add: list[np.ndarray]) -> list[np.ndarray]:
    """mma.m16n8k8 of TF32, by the fragments that the PTX manual draws: 13 bits of the operands' 23 are not read."""
    a, b, c = np.zeros((16, 8)), np.zeros((8, 8)), np.zeros((16, 8))
    for i in range(4):
        a[GROUP + 8 * (i % 2), MEMBER + 4 * (i // 2)] = tf32(left[i])
        c[GROUP + 8 * (i // 2), 2 * MEMBER + i % 2] = add[i]
    for i in range(2):
        b[MEMBER + 4 * i, GROUP] = tf32(right[i])
    d = (a @ b + c).astype(np.float32)
    return [d[GROUP + 8 * (i // 2), 2 * MEMBER + i % 2] for i in range(4)]


def tf32(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
