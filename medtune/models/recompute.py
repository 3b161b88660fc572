"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): a model's blocks compute their activations again in the
backward pass instead of keeping them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from medtune.models.parts import parts_of


def checkpoint_activations(model: nn.Module) -> None:
    """Make every block of a model from `build` compute its activations again in the backward pass; in place.

    Values, gradients, running statistics and random numbers stay as they are, names of weights too; in eval mode or
    without gradients nothing changes. The model can be copied (copy.deepcopy), not pickled. Raises ValueError for a
    model that has none of the blocks that the model files name.
    """
    blocks: list[Any] = parts_of(model, "BLOCKS")
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks that are known here: was it made by medtune.models.build?")
    for block in blocks:
        if not hasattr(block, "recomputes"):
            block.__class__ = _recomputing(block.__class__)  # another class, since a wrapper would rename the weights


@functools.cache
def _recomputing(kind: Any) -> type[nn.Module]:
    """A class of blocks that differs in its forward pass alone."""

    def forward(self: nn.Module, *inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return kind.forward(self, *inputs)
        again = functools.partial(kind.forward, self)
        contexts = lambda: (contextlib.nullcontext(), _statistics_kept(self))  # noqa: E731
        return checkpoint(again, *inputs, use_reentrant=False, context_fn=contexts)

    return type(f"Recomputing{kind.__name__}", (kind,), {"forward": forward, "recomputes": True})


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """BatchNorm counts a batch once: what is computed again moves the running statistics by nothing.

    Not by track_running_stats: without statistics BatchNorm saves fewer tensors, and the backward pass wants them all.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # a counter of its own, as synchronised BatchNorm insists on one
        counter = norm.num_batches_tracked
        norm.momentum, norm.num_batches_tracked = 0.0, None if counter is None else counter.clone()
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
