"""Architectures by name. To add one: one file with a function (num_classes, in_channels) -> nn.Module, one line here.

Importing this package imports neither torch nor timm: the command line and the configuration only need the names.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from medtune.errors import ConfigError, unknown

if TYPE_CHECKING:
    from torch import nn

# name -> module that has a function of that name
_MODULES = {
    "medmamba_t": "medtune.models.medmamba",
    "medmamba_s": "medtune.models.medmamba",
    "medmamba_b": "medtune.models.medmamba",
    "medvit_small": "medtune.models.medvit",
    "medvit_base": "medtune.models.medvit",
    "medvit_large": "medtune.models.medvit",
    "resnet50": "medtune.models.resnet",
    "vim_tiny": "medtune.models.vim",
    "vim_small": "medtune.models.vim",
    "vmamba_t": "medtune.models.vmamba",
    "vmamba_s": "medtune.models.vmamba",
    "vmamba_b": "medtune.models.vmamba",
}
_PATCH_MOMENTUM = frozenset(name for name, module in _MODULES.items() if module == "medtune.models.medvit")


def available() -> tuple[str, ...]:
    """Names that `build` knows, sorted."""
    return tuple(sorted(_MODULES))


def module_of(name: str) -> str:
    """The module that a model of `available()` is in."""
    return _MODULES[name]


def modules() -> tuple[str, ...]:
    """The modules that the models are in. Each says in BLOCKS what its models are made of."""
    return tuple(dict.fromkeys(_MODULES.values()))


def has_patch_momentum(name: str) -> bool:
    """Whether `build(name, patch_momentum=True)` gives a model: one whose forward takes `partners`, as MedViT's."""
    return name in _PATCH_MOMENTUM


def build(name: str, num_classes: int = 2, in_channels: int = 3, *, patch_momentum: bool = False) -> nn.Module:
    """A model that takes images (B, in_channels, H, W) and gives logits (B, num_classes).

    patch_momentum: the model also takes `partners` (see `medtune.models.medvit`). Initial weights come from torch's
    global random numbers. Raises ConfigError for a name that is not in `available()`, a number that is below 1, or a
    model that has no patch momentum changer.
    """
    if name not in _MODULES:
        raise ConfigError(unknown("model", name, _MODULES))
    for field, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigError(f"{field} must be at least 1, got {value}")
    make = getattr(importlib.import_module(_MODULES[name]), name)
    if not patch_momentum:
        return make(num_classes, in_channels)
    if not has_patch_momentum(name):
        having = ", ".join(sorted(_PATCH_MOMENTUM))
        raise ConfigError(f"patch_momentum is not there for {name}; models that have it: {having}")
    return make(num_classes, in_channels, patch_momentum=True)


def load_published(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """See `medtune.models.published.load_published`."""
    from medtune.models.published import load_published as load

    load(model, state_dict)


def checkpoint_activations(model: nn.Module) -> None:
    """See `medtune.models.recompute.checkpoint_activations`."""
    from medtune.models.recompute import checkpoint_activations as recompute

    recompute(model)


def load_pretrained(name: str, model: nn.Module, source: str) -> list[str]:
    """See `medtune.models.pretrained.load_pretrained`."""
    from medtune.models.pretrained import load_pretrained as load

    return load(name, model, source)


def check_pretrained(names: Iterable[str], source: str, num_classes: int = 2) -> list[str]:
    """See `medtune.models.pretrained.check_pretrained`."""
    from medtune.models.pretrained import check_pretrained as check

    return check(names, source, num_classes)


def __getattr__(attribute: str) -> Any:
    """`build_NAME(num_classes=2, in_channels=3)` for every name, for tools that want a factory each."""
    name = attribute.removeprefix("build_")
    if name != attribute and name in _MODULES:
        return functools.partial(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
