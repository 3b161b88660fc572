"""Which models are tested in full."""

import pytest

from medtune.models import _MODULES

SMALL = tuple({module: name for name, module in reversed(_MODULES.items())}.values())
"""The first of each file, for what takes long: the larger variants are the same code with other numbers."""

LARGER = tuple(name for name in _MODULES if name not in SMALL)
FULL = (*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER))
"""All of them; the larger ones in `make test-slow`."""
