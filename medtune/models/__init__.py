"""Architectures by name."""

from __future__ import annotations


def available() -> tuple[str, ...]:
    """Names that `build` knows."""
    return ("medmamba_b", "medmamba_s", "medmamba_t", "resnet50")
