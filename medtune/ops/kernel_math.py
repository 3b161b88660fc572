"""Functions that several Triton kernels compute with."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """In two special functions and no division, which takes five instructions: 1 / sqrt(v) squared, v from 1 up."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root
