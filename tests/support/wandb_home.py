"""An environment in which W&B knows nothing of the user of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

KEY = "a" * 40


def isolate(patch: pytest.MonkeyPatch, home: Path) -> None:
    """No key, no settings, no server: a home of its own and none of W&B's variables."""
    home.mkdir(parents=True, exist_ok=True)
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))
    patch.setenv("NO_PROXY", "127.0.0.1")
