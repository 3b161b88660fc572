"""The processes that train one trial together: who does which part, and how parts are put together.

Every process draws the same order, the same augmentation and the same decisions; each computes its own part of every
batch, and DistributedDataParallel makes the gradient that of the whole batch. One process is a group of one, for which
nothing is sent.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = datetime.timedelta(minutes=10)
"""How long a process waits for the others before it gives up on them."""


@dataclass(frozen=True)
class Group:
    """This process's place among `world` processes."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, tests and reports."""
        return self.rank == 0

    def part(self, start: int, stop: int) -> tuple[int, int]:
        """This process's share of [start, stop): consecutive, and as even as can be."""
        count = stop - start
        return start + count * self.rank // self.world, start + count * (self.rank + 1) // self.world

    def add_up(self, *tensors: Tensor) -> None:
        """Sum each tensor over the processes, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order."""
        found: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's buffers: BatchNorm's statistics, where they were not synchronised."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call in training so that gradients are the group's; on GPUs BatchNorm then counts the whole batch.

        The model itself is changed where it has BatchNorm (`SyncBatchNorm`, of the same names and values).
        """
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        if device.type != "cuda":
            return DistributedDataParallel(model)
        return DistributedDataParallel(model, device_ids=[device])


SOLO = Group()
"""A trial that one process trains alone."""


def synchronised(model: nn.Module, group: Group, device: torch.device) -> nn.Module:
    """The model with BatchNorm over the whole group's images, where that can be done: on GPUs."""
    if group.world == 1 or device.type != "cuda":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def without_sync(net: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Gradients computed in this context stay in this process, to be added to and sent with the next ones."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def joined(group: Group, address: str, device: torch.device, *, local: bool) -> Iterator[None]:
    """Be one of the group. `address`: torch's init_method, the same for all; `local`: all are on this machine."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if local:  # nothing of a group on one machine listens beyond it
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(backend, init_method=address, rank=group.rank, world_size=group.world, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
