"""Two computations that need nothing of each other, beside each other on a GPU.

One that waits for memory or has few programs leaves room that the other takes. It is the steps recorded as CUDA graphs
that ask for it (`medtune.steps`): started kernel by kernel, both would wait for Python. The backward pass follows, as
autograd runs what belongs to an operation on that operation's stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_second: torch.cuda.Stream | None = None


@contextlib.contextmanager
def beside_each_other(second: torch.cuda.Stream) -> Iterator[None]:
    """Inside, the first of two computations given to `both` runs on the stream `second`."""
    global _second
    before, _second = _second, second
    try:
        yield
    finally:
        _second = before


def both(
    one: Callable[[Tensor], Tensor], x: Tensor, other: Callable[[Tensor], Tensor], y: Tensor
) -> tuple[Tensor, Tensor]:
    """one(x) and other(y)."""
    if _second is None or not x.is_cuda:
        return one(x), other(y)
    current = torch.cuda.current_stream()
    _second.wait_stream(current)
    with torch.cuda.stream(_second):
        found = one(x)
    result = found, other(y)
    current.wait_stream(_second)
    # Memory is given out anew in the order of its own stream: not before the other is through with it, too.
    x.record_stream(_second)
    found.record_stream(current)
    return result
