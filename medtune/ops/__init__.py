"""Operations that models share; importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medtune.ops.scan import selective_scan

__all__ = ["selective_scan"]


def __getattr__(name: str) -> Any:
    if name == "selective_scan":
        from medtune.ops.scan import selective_scan

        return selective_scan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
