"""Data pairs: what is trained on and what it is tested on from outside."""

from __future__ import annotations


def available_pairs() -> tuple[str, ...]:
    """Names of the registered pairs."""
    return ("pneumoniamnist-cpn", "synthetic")
