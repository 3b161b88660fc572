"""The parts of a model that its file names, for what is done to models of every kind: BLOCKS, COMPILED, CHANNELS_LAST,
FILTERS_LAST."""

from __future__ import annotations

import sys

from torch import nn

from medtune.models import modules


def parts_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a model whose classes the model files list under a name."""
    files = [sys.modules[file] for file in modules() if file in sys.modules]
    kinds = tuple(kind for file in files for kind in getattr(file, name, ()))
    return [module for module in model.modules() if isinstance(module, kinds)]
