"""A model's weights out of any checkpoint, ours or published, without running code."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from medtune.checkpoint import best_file, is_ours, read
from medtune.errors import CheckpointError

PICKLED = (".pth", ".pt", ".ckpt", ".bin")
"""Suffixes of published weights that torch.load reads."""


def load_weights(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A model's weights by name, and our metadata, from any checkpoint; no code in it is run.

    path: one of our files (or a folder of them: its best weights), or a published .safetensors, .pth, .pt, .ckpt or
    .bin, whose contents come back as they are, without metadata. Raises CheckpointError when missing, damaged, of
    another kind, or when it holds more than tensors and plain values.
    """
    if path.is_dir():
        best = best_file(path)
        if best is None:
            raise CheckpointError(f"folder {path} holds no best-*.safetensors")
        path = best
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.suffix in PICKLED:
        return _load_pickled(path), None
    if path.suffix != ".safetensors":
        known = ", ".join((".safetensors", *PICKLED))
        raise CheckpointError(f"checkpoint {path} is of an unknown type {path.suffix!r}. Known: {known}")
    if not is_ours(path):
        return load_file(path), None
    tensors, about = read(path)
    if about["kind"] == "last":
        tensors = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    return tensors, about


def _load_pickled(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the unpickler raise nearly anything
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if named is None:
            reason = next(iter(str(error).splitlines()), "").split(". ")[0]
            raise CheckpointError(
                f"checkpoint {path} is damaged, or no checkpoint: {type(error).__name__} {reason}".rstrip()
            ) from error
        raise CheckpointError(
            f"checkpoint {path} holds {named[1]}, which only running its code would load: refused. "
            "Where you trust it, save its state_dict alone again: torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(found).__name__}, not weights by name")
    return found
