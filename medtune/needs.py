"""What trials need of a GPU's memory, measured once per model, size, batch and the like, and kept beside the studies.

The trial's process measures (`medtune.memory.used`), the driver alone writes: one file for each kind of trial in
`memory-needs/`. Deleting the folder finds out anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medtune import kept
from medtune.config import TrialConfig

FOLDER = "memory-needs"
GROWTH = 1.25
"""Factor on a need that turned out to be too little."""
NOTICED = 1.01
"""A need that is more than the known one by this factor is written down."""
DECIDING = (
    "model",
    "pair",  # whose images lie on the device
    "native_size",
    "image_size",
    "batch_size",
    "micro_batch",
    "precision",
    "optimizer",
    "activation_checkpointing",
    "patch_momentum",
    "train_limit",
)
"""The settings that decide how much memory a trial takes."""


class Needs:
    """The needs in `folder`, read when first asked for."""

    def __init__(self, folder: Path, processes: int = 1) -> None:
        """`processes`: that train a trial together, each on a card of its own."""
        self.folder = folder
        self.processes = processes
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def need(self, config: TrialConfig, kind: str) -> float | None:
        """Bytes that a trial takes of a card of that kind, its process included; None while nobody measured it."""
        found = self._read(config)["kinds"].get(kind)
        return float(found["need"]) if found else None

    def overhead(self, config: TrialConfig, kind: str) -> float:
        """Bytes of the need that are the process's own, beyond what it gives to tensors."""
        found = self._read(config)["kinds"].get(kind)
        return float(found["overhead"]) if found else 0.0

    def least(self, config: TrialConfig, kind: str) -> float:
        """Bytes that a card must have as far as is known: measured on this kind, else on another; 0: nothing is known."""
        own = self.need(config, kind)
        kinds = self._read(config)["kinds"].values()
        return own if own is not None else max((float(one["need"]) for one in kinds), default=0.0)

    def too_small(self, config: TrialConfig) -> float:
        """Bytes of the largest card that did not hold it alone; 0: none is known."""
        return float(self._read(config)["too_small"])

    def fits(self, config: TrialConfig, kind: str, memory: float) -> bool:
        """Whether a card of `memory` bytes holds it, as far as is known."""
        return memory > self.too_small(config) and self.least(config, kind) <= memory

    def note(self, config: TrialConfig, measured: Mapping[str, Any]) -> None:
        """Take in what a trial alone on a card took (`medtune.memory.used`)."""
        need = float(measured["reserved"] + measured["overhead"])
        if need > (self.need(config, measured["kind"]) or 0.0) * NOTICED:
            self._write(config, measured["kind"], need, float(measured["overhead"]))

    def grow(self, config: TrialConfig, kind: str, memory: float) -> None:
        """Its measured part of a shared card of `memory` bytes was too little."""
        known = self.need(config, kind)
        if known is not None:
            self._write(config, kind, min(known * GROWTH, memory), self.overhead(config, kind))

    def note_too_small(self, config: TrialConfig, memory: float) -> None:
        """A card of `memory` bytes did not hold it alone."""
        found = self._read(config)
        found["too_small"] = max(float(found["too_small"]), memory)
        self._save(config, found)

    def _key(self, config: TrialConfig) -> tuple[Any, ...]:
        return tuple(getattr(config, name) for name in DECIDING)

    def _about(self, config: TrialConfig) -> dict[str, Any]:
        return {**dict(zip(DECIDING, self._key(config), strict=True)), "processes": self.processes}

    def _path(self, config: TrialConfig) -> Path:
        return kept.file_of(self.folder, self._about(config))

    def _read(self, config: TrialConfig) -> dict[str, Any]:
        key = self._key(config)
        if key not in self._known:
            found = kept.read(self._path(config))
            whole = isinstance(found.get("kinds"), dict) and "too_small" in found
            self._known[key] = {name: found[name] for name in ("kinds", "too_small")} if whole else _nothing()
        return self._known[key]

    def _write(self, config: TrialConfig, kind: str, need: float, overhead: float) -> None:
        found = self._read(config)
        found["kinds"][kind] = {"need": need, "overhead": overhead}
        self._save(config, found)

    def _save(self, config: TrialConfig, found: Mapping[str, Any]) -> None:
        kept.write(self._path(config), {**self._about(config), **found})


def _nothing() -> dict[str, Any]:
    return {"kinds": {}, "too_small": 0.0}
