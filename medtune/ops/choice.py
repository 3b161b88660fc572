"""The engines of the selective scan by name, and the rule that chooses one; without torch, for `medtune doctor`."""

from __future__ import annotations

from collections.abc import Mapping

ENGINES = ("triton", "mamba", "torch")
"""The fastest first."""
VARIABLE = "MEDTUNE_SCAN"


def choose(wanted: str | None, missing: Mapping[str, str]) -> str:
    """The engine that is wanted, or else the fastest; `missing` says of each why it is not there, "" where it is.

    Raises ValueError for a name that is none, or an engine that is not there.
    """
    if wanted is None:
        return next(name for name in ENGINES if not missing.get(name, "not looked for"))
    if wanted not in ENGINES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(ENGINES)}, or unset for the fastest, got {wanted!r}")
    if missing[wanted]:
        raise ValueError(f"{VARIABLE} asks for {wanted}, which is not there: {missing[wanted]}")
    return wanted
