"""When a batch does not fit into a device's memory: what that looks like, and what is remembered of it.

What is remembered is how many images a device can compute at once, by GPU kind, model, image size and the like: one small
file each in the studies' folder, so that the next trial of that kind starts with what fits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medtune import kept
from medtune.config import TrialConfig
from medtune.data import PairData
from medtune.errors import MedtuneError

LEAST = 2
"""BatchNorm needs two images."""
_SIGNS = ("out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_HOST")


class OutOfMemory(MedtuneError):
    """A batch, or the part of it that was computed at once, does not fit into the device's memory."""

    def __init__(self, message: str, fits: int | None) -> None:
        """`fits`: images at once to try next; None when fewer are not possible."""
        super().__init__(message)
        self.fits = fits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or of a CUDA library says that memory is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def device_kind(device: torch.device) -> str:
    """`NVIDIA H200, 139.8 GiB`, or `cpu`."""
    if device.type != "cuda":
        return device.type
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory / 2**30:.1f} GiB"


def fewer(config: TrialConfig, device: torch.device, tried: int) -> OutOfMemory:
    """The error for `tried` images at once that did not fit, with half as many to try next."""
    what = f"{config.model} at {config.image_size} px (batch {config.batch_size})"
    if tried <= LEAST:
        return OutOfMemory(
            f"{what} does not fit into the memory of {device_kind(device)}, not even {LEAST} images at once (3 where one is "
            "left over), the fewest that BatchNorm can work with. Smaller: --activation-checkpointing, a lower "
            "--image-size, a smaller model",
            None,
        )
    fits = max(LEAST, tried // 2)
    return OutOfMemory(f"{what}: {tried} images at once do not fit into the memory of {device_kind(device)}", fits)


def no_room(config: TrialConfig, data: PairData, device: torch.device) -> OutOfMemory:
    """The error for a model and its images that do not even fit before training."""
    size = (data.train.images.nbytes + data.val.images.nbytes) / 2**30
    what = f"{config.model} and the images of {data.name} ({size:.1f} GiB)"
    return OutOfMemory(
        f"{what} do not fit into the memory of {device_kind(device)}. "
        "Smaller: --train-limit, --native-size, a smaller model; or another process holds the memory",
        None,
    )


LEAST_PART = 0.01
"""Of a card: torch takes no part of 0."""


def limit_memory(device: torch.device, fraction: float | None) -> None:
    """Let this process give at most that fraction of its card to tensors, so that it takes no neighbour's room.

    None: all of it. Also begins to watch the peak for `used`.
    """
    if device.type == "cuda":
        # Of the current device: this call takes no "cuda" without a number.
        torch.cuda.set_per_process_memory_fraction(1.0 if fraction is None else max(LEAST_PART, fraction))
        torch.cuda.reset_peak_memory_stats(device)


def used(device: torch.device) -> dict[str, Any] | None:
    """What this process, alone on its card, has taken of it since `limit_memory`, in bytes; None on a CPU.

    `reserved`: the most that torch held for tensors; `overhead`: what CUDA, its libraries and whatever else is on the card
    take beside that.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return {
        "kind": torch.cuda.get_device_properties(device).name,
        "card": total,
        "reserved": torch.cuda.max_memory_reserved(device),
        "overhead": max(0, total - free - torch.cuda.memory_reserved(device)),
    }


class Remembered:
    """How many images fit at once, by what decides it, in one file each in `folder`."""

    def __init__(
        self, folder: Path, config: TrialConfig, device: torch.device, share: float = 1.0, processes: int = 1
    ) -> None:
        """`share`: the part of a GPU that each of the trial's processes has."""
        self.key: dict[str, Any] = {
            "device": device_kind(device),
            "share": share,
            "processes": processes,
            "model": config.model,
            "pair": config.pair,  # whose images lie on the device
            "native_size": config.native_size,
            "image_size": config.image_size,
            "precision": config.precision,
            "optimizer": config.optimizer,
            "activation_checkpointing": config.activation_checkpointing,
        }
        self.path = kept.file_of(folder, self.key)

    def read(self) -> int | None:
        """Images at once that were left to try when more did not fit; None when nothing is known."""
        value = kept.read(self.path).get("micro_batch")
        return value if isinstance(value, int) and value >= LEAST else None

    def write(self, micro_batch: int) -> None:
        """Remember it unless less is remembered."""
        known = self.read()
        kept.write(self.path, {**self.key, "micro_batch": min(micro_batch, known or micro_batch)})


def least(*numbers: int | None) -> int | None:
    """The least of those that are numbers; None when none is."""
    return min((n for n in numbers if n is not None), default=None)
