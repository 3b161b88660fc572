"""One step of the optimizer: a batch's loss, its gradients and the step, run kernel by kernel or as one CUDA graph.

A model of small maps is thousands of kernels a step, each shorter than its launch takes: the GPU waits for Python. A CUDA
graph is those kernels recorded once and started together, with the same results. A batch size is recorded after `WARM` steps
without, which is when libraries choose their ways and the optimizer makes its state.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.config import TrialConfig
from medtune.errors import ConfigError
from medtune.evaluate import autocast
from medtune.ops.beside import beside_each_other
from medtune.parallel import SOLO, Group, without_sync

if TYPE_CHECKING:
    from medtune.data.transforms import Draws

WARM = 3
"""Steps of a batch size before it is recorded."""
MOST = 4
"""Batch sizes that are recorded; an epoch has two."""
LATER = 3
"""Streams for gradients of weights."""
SWITCH = "MEDTUNE_CUDA_GRAPHS"
"""Environment variable: 0 for steps kernel by kernel, as debuggers and profilers want them."""
COMPILE = "MEDTUNE_COMPILE"
"""Environment variable: 1 to compile the model's blocks, 0 not to; else they are where it `pays`."""
PAYS = 500_000
"""Training images of 224 px, all epochs together, from which on compiling gives back more than it takes: 57 s for 0.21 ms an
image, MedMamba-s on an H200 (benchmarks/NOTES.md); at most 40 s for 0.04 ms, ResNet-50. Once a machine: a warm cache on disk
takes seconds."""


@dataclass(frozen=True)
class Batch:
    """What a step reads, on the device."""

    images: Tensor
    """uint8 (B, C, H, W), as stored."""
    labels: Tensor
    """int64 (B,)."""
    changes: Draws
    partners: Tensor | None = None
    """int64 (B,), within the piece that it is computed in (MedViT's patch momentum)."""

    def part(self, first: int, last: int) -> Batch:
        """Images first to last."""
        partners = None if self.partners is None else self.partners[first:last]
        return Batch(self.images[first:last], self.labels[first:last], self.changes.part(first, last), partners)

    def tensors(self) -> list[Tensor]:
        """All of them, in an order of their own."""
        drawn = [self.changes.boxes, self.changes.flips, self.changes.looks]
        return [x for x in (self.images, self.labels, *drawn, self.partners) if x is not None]

    def copy(self) -> Batch:
        """The same in tensors of its own."""
        partners = None if self.partners is None else self.partners.clone()
        return Batch(self.images.clone(), self.labels.clone(), self.changes.copy(), partners)


class Stepper:
    """Takes the steps of a training.

    net: what is trained, wrapped for its group; weights: (K,) of the classes or None; group: the processes that share
    each batch.
    """

    problem: str | None = None
    """Why steps that were to be recorded are not."""

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, config: TrialConfig, weights: Tensor | None, group: Group
    ) -> None:
        self.net = net
        self.optimizer = optimizer
        self.config = config
        self.weights = weights
        self.group = group
        self.parameters = list(net.parameters())

    def step(self, batch: Batch, marks: Sequence[tuple[int, int]], total: int) -> tuple[Tensor, Tensor]:
        """Compute this process's share of a batch of `total` images in the pieces `marks`, and take the optimizer's step.

        Returns logits (B, K) in float32 and the share of the loss, a scalar; both are overwritten by the next step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        return self._step(batch, marks, total)

    def _step(self, batch: Batch, marks: Sequence[tuple[int, int]], total: int) -> tuple[Tensor, Tensor]:
        from medtune.data.transforms import augment

        outputs, losses = [], []
        for first, last in marks:
            part = batch.part(first, last)
            images = augment(part.images, self.config.image_size, part.changes, self._compiles(len(batch.labels)))
            sending = contextlib.nullcontext() if last == marks[-1][1] else without_sync(self.net)
            with sending:
                with autocast(self.config.precision, images.device):
                    output, loss = self._loss(images, part)
                # Over the images, not over their weights, whose mean is 1 over the training set: what an image counts does
                # not depend on those that share its batch.
                loss = loss / total
                # DistributedDataParallel takes the mean over processes of what is wanted as a sum.
                (loss * self.group.world).backward()
            outputs.append(output.detach())
            losses.append(loss.detach())
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        return torch.cat(outputs), torch.stack(losses).sum()

    def _compiles(self, size: int) -> bool:
        """Whether a batch of so many images runs compiled."""
        return False

    def _loss(self, images: Tensor, part: Batch) -> tuple[Tensor, Tensor]:
        """Logits in float32 and the sum of the images' (weighted) cross entropies, in float32."""
        if part.partners is None:
            output = self.net(images).float()
            return output, self._cross_entropy(output, part.labels)
        from medtune.models.medvit import OWN_LABEL

        output = self.net(images, part.partners).float()
        own, other = (self._cross_entropy(output, y) for y in (part.labels, part.labels[part.partners]))
        return output, OWN_LABEL * own + (1 - OWN_LABEL) * other

    def _cross_entropy(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels, weight=self.weights, reduction="sum")


@dataclass
class _Recorded:
    """A graph and the tensors that it reads and leaves."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    output: Tensor
    loss: Tensor
    lrs: list[float]
    marks: list[tuple[int, int]]


class GraphStepper(Stepper):
    """Steps as CUDA graphs, which share one pool of memory.

    What cannot be recorded is run kernel by kernel from then on, and `problem` says why.
    """

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, config: TrialConfig, weights: Tensor | None, compiles: bool
    ) -> None:
        """`compiles`: whether the model's blocks are compiled before whole batches are recorded."""
        super().__init__(net, optimizer, config, weights, SOLO)
        self.compiles = compiles
        self._stream, *self._others = _side_streams(torch.cuda.current_device())
        self._warmed: dict[int, int] = {}
        self._recorded: dict[int, _Recorded] = {}

    def step(self, batch: Batch, marks: Sequence[tuple[int, int]], total: int) -> tuple[Tensor, Tensor]:
        size = len(batch.labels)
        found = self._recorded.get(size)
        # The rate is written into the kernels that were recorded; it changes a few times a trial.
        if found is not None and (found.lrs != self._lrs() or found.marks != list(marks)):
            del self._recorded[size]
            found = None
        if found is None and self._ready(size):
            found = self._record(batch, marks, total)
        if found is None:
            self._warmed[size] = self._warmed.get(size, 0) + 1
            with self._as_recorded(size):
                return self._on_side(lambda: Stepper.step(self, batch, marks, total))
        for held, new in zip(found.batch.tensors(), batch.tensors(), strict=True):
            held.copy_(new, non_blocking=True)
        found.graph.replay()
        return found.output, found.loss

    @contextlib.contextmanager
    def _as_recorded(self, size: int) -> Iterator[None]:
        """Compiled, and on several streams: so are steps recorded, and those before a recording taken."""
        # After one that broke off on one stream: memory of several is not given back while a recording is believed to go on.
        several = contextlib.nullcontext() if self.problem else beside_each_other(*self._others)
        with self._compiled(size), several:
            yield

    def _compiled(self, size: int) -> contextlib.AbstractContextManager[None]:
        if not self._compiles(size):
            return contextlib.nullcontext()
        from medtune.models.compiled import compiled

        return compiled(self.net)

    def _compiles(self, size: int) -> bool:
        """An epoch's last batch, of another size, runs as it is: it would be compiled anew, for one step an epoch."""
        return self.compiles and size == self.config.batch_size

    def _ready(self, size: int) -> bool:
        warm = max(self._warmed.values(), default=0) >= WARM and self._warmed.get(size, 0) > 0
        return self.problem is None and warm and len(self._recorded) < MOST

    def _lrs(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _on_side(self, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """On the stream that is recorded, as what runs before a recording has to."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _record(self, batch: Batch, marks: Sequence[tuple[int, int]], total: int) -> _Recorded | None:
        """Nothing is computed by it: the step is still to be taken."""
        size, held = len(batch.labels), batch.copy()
        pool = next((one.graph.pool() for one in self._recorded.values()), None)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the steps so far took is room for the graph's pool
        current = torch.cuda.current_stream()
        try:
            recording = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
            with self._as_recorded(size), recording:
                output, loss = self._step(held, marks, total)
        except RuntimeError as error:
            # Not only memory: a library may want to ask the device something, which a recording does not allow.
            torch.cuda.set_stream(current)  # torch's way out of a recording does not come as far when it breaks off
            self._break_off(error)
            return None
        self._recorded[size] = found = _Recorded(graph, held, output, loss, self._lrs(), list(marks))
        return found

    def _break_off(self, error: RuntimeError) -> None:
        """Go on kernel by kernel."""
        global _broken
        # The way out of a recording fails as well, and says only that something did before.
        cause = error.__context__ or error
        self.problem = _broken = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        self._recorded.clear()
        _side_streams.cache_clear()  # nobody after this trial is to work on a stream whose recording broke off
        # What breaks off leaves the device's random numbers in a recording's state, in which no step may draw any.
        numbers = torch.cuda.default_generators[torch.cuda.current_device()]
        numbers.graphsafe_set_state(numbers.clone_state())
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()


_broken: str | None = None


def broken_recording() -> str | None:
    """Why a recording of this process broke off, if one did.

    PyTorch's allocators may believe that it still goes on (github.com/pytorch/pytorch/issues/180395): memory is not given
    back, pinned memory refused. The trial can be ended in such a process, another is better begun in one of its own.
    """
    return _broken


@functools.cache
def _side_streams(device: int) -> tuple[torch.cuda.Stream, ...]:
    """A few for all trials of a process: libraries keep room (70 MB) for every stream that they have worked on.

    Where there is room for one of them, the first two go first, as a step waits for both; the others have what nothing waits
    for but the optimizer, much of it when the first are through (benchmarks/NOTES.md).
    """
    first = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]
    return *first, *(torch.cuda.Stream(device) for _ in range(LATER))


def stepper_of(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrialConfig,
    weights: Tensor | None,
    group: Group,
    images: int,
) -> Stepper:
    """CUDA graphs where there can be any: for one process on a GPU that keeps its activations.

    Activation checkpointing reads the state of the random numbers between blocks, which a recording does not allow.
    images: how many the training has still to see, all epochs together. Raises ConfigError for a bad
    $MEDTUNE_CUDA_GRAPHS or $MEDTUNE_COMPILE.
    """
    recorded, compiles = _switch(SWITCH, True), _switch(COMPILE, pays(images, config.image_size))
    device = next(net.parameters()).device
    if recorded and device.type == "cuda" and group.world == 1 and not config.activation_checkpointing:
        return GraphStepper(net, optimizer, config, weights, compiles)
    return Stepper(net, optimizer, config, weights, group)


def pays(images: int, size: int) -> bool:
    """Whether compiling is worth its time for so many training images of `size` px: what it saves goes with their area."""
    return images * (size / 224) ** 2 >= PAYS


def _switch(name: str, default: bool) -> bool:
    wanted = os.environ.get(name, "")
    if wanted not in ("", "0", "1"):
        raise ConfigError(f"${name} is {wanted!r}: 1 for yes, 0 for no, or unset")
    return default if wanted == "" else wanted == "1"
