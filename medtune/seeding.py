"""Randomness that depends on a trial's seed, the epoch and the purpose alone, never on what ran before."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def stream_seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed of its own for each stream of randomness: neighbouring seeds and epochs share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()[:7])


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator on the CPU: its draws are equal on every device, and nothing waits for the device."""
    return torch.Generator().manual_seed(stream_seed(seed, epoch, purpose))


@contextlib.contextmanager
def reproducible(device: torch.device, seed: int, epoch: int, purpose: str) -> Iterator[None]:
    """Torch's own generators seeded, and on CPU deterministic algorithms; everything as it was afterwards."""
    cuda = device.type == "cuda"
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.manual_seed(stream_seed(seed, epoch, purpose))
        try:
            if not cuda:
                # Filling fresh memory only helps to find bugs, and costs time.
                torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
