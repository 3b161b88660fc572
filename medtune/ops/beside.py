"""Computations that need nothing of each other, beside each other on a GPU.

One that waits for memory or has few programs leaves room that the other takes. It is the steps recorded as CUDA graphs
that ask for it (`medtune.steps`): started kernel by kernel, all would wait for Python. The backward pass follows, as
autograd runs what belongs to an operation on that operation's stream.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made", bound=Sequence[object])

_streams: tuple[torch.cuda.Stream, Iterator[torch.cuda.Stream]] | None = None


@contextlib.contextmanager
def beside_each_other(second: torch.cuda.Stream, *others: torch.cuda.Stream) -> Iterator[None]:
    """Inside, the first of two computations given to `both` runs on `second`; what is made `ahead` on others by turns."""
    global _streams
    before, _streams = _streams, (second, itertools.cycle(others))
    try:
        yield
    finally:
        _streams = before


def both(
    one: Callable[[Tensor], Tensor], x: Tensor, other: Callable[[Tensor], Tensor], y: Tensor
) -> tuple[Tensor, Tensor]:
    """one(x) and other(y)."""
    if _streams is None or not x.is_cuda:
        return one(x), other(y)
    current, second = torch.cuda.current_stream(), _streams[0]
    second.wait_stream(current)
    with torch.cuda.stream(second):
        found = one(x)
    result = found, other(y)
    current.wait_stream(second)
    # Memory is given out anew in the order of its own stream: not before the other is through with it, too.
    x.record_stream(second)
    found.record_stream(current)
    return result


class Ahead(Generic[Made]):
    """What is made of weights alone, before it is wanted, on a stream that does not wait for the model."""

    def __init__(self, made: Made, done: torch.cuda.Event | None) -> None:
        self._made = made
        self._done = done

    def get(self) -> Made:
        """For the current stream, which waits until it is made."""
        if self._done is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self._done)
            for x in _tensors(self._made):
                x.record_stream(current)
        return self._made


def ahead(make: Callable[[], Made]) -> Ahead[Made]:
    """Make it now, beside what follows."""
    if _streams is None:
        return Ahead(make(), None)
    stream = next(_streams[1])
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        return Ahead(make(), stream.record_event())


def _tensors(made: object) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, tuple):
        for part in made:
            yield from _tensors(part)
