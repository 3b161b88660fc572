"""Starting from weights that others trained: all but the classifier, which is made for the classes at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from medtune.errors import CheckpointError, ConfigError
from medtune.models import build
from medtune.models.published import CLASSIFIERS, load_published, require_same, tensors
from medtune.weights import load_weights

TIMM = "timm"
TIMM_MODELS = ("resnet50",)


def load_pretrained(name: str, model: nn.Module, source: str) -> list[str]:
    """Put the weights of `source` into `model`, which `build(name)` made; returns what there is to say about it.

    source: a checkpoint's path (ours, or in the published layout: .safetensors, or pickled tensors), or "timm" (resnet50
    alone; downloaded, or from the user's cache). A classifier for another number of classes is left as it is and noted;
    all else must fit. Raises CheckpointError that names the keys that do not fit, or for weights that cannot be got, and
    ConfigError for a model that timm is not asked for.
    """
    given, notes = _read(name, source)
    given, replaced = _keep_classifier(given, model.state_dict())
    try:
        load_published(model, given)
    except CheckpointError as error:
        raise CheckpointError(f"{source} as {name}: {error}") from error
    return notes + replaced


def check_pretrained(names: Iterable[str], source: str, num_classes: int = 2) -> list[str]:
    """Raise what `load_pretrained` would for models of these names, before a study starts; reads the weights once each.

    Returns what there is to say about them.

    names: all models of a study's space. Weights fit one architecture, so a space of several fails.
    """
    notes: list[str] = []
    for name in sorted(set(names)):
        with torch.device("meta"):
            own = build(name, num_classes).state_dict()
        given, said = _read(name, source)
        given, replaced = _keep_classifier(given, own)
        notes += said + replaced
        try:
            require_same(given, own)
        except CheckpointError as error:
            raise CheckpointError(f"{source} as {name}: {error}") from error
    return notes


def _read(name: str, source: str) -> tuple[dict[str, Tensor], list[str]]:
    if source == TIMM:
        return _from_timm(name)
    given, about = load_weights(Path(source))
    if about is not None and about["config"]["model"] != name:
        raise CheckpointError(f"{source} is of model {about['config']['model']}, not {name}: only that can start from it")
    return tensors(given), []


def _from_timm(name: str) -> tuple[dict[str, Tensor], list[str]]:
    from timm.models.resnet import resnet50

    if name not in TIMM_MODELS:
        known = ", ".join(TIMM_MODELS)
        raise ConfigError(f"timm has no weights for {name} (for {known} alone): name a file with --pretrained")
    try:
        with torch.random.fork_rng(devices=[]):  # the weights it starts from before it loads are nobody's
            model = resnet50(pretrained=True)
    except Exception as error:  # hubs, proxies and caches raise nearly anything
        reason = (next(iter(str(error).splitlines()), "") or type(error).__name__).rstrip(".")
        raise CheckpointError(
            f"timm could not get its weights for {name}: {reason}. Without the network: download model.safetensors "
            "of timm/resnet50.a1_in1k from the Hugging Face hub elsewhere, and name the file with --pretrained"
        ) from error
    origin = f"{model.pretrained_cfg['architecture']}.{model.pretrained_cfg['tag']}"
    return model.state_dict(), [f"weights of timm's {origin}"]


def _keep_classifier(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The model's own classifier in place of one for another number of classes."""
    notes = []
    for layer in CLASSIFIERS:
        theirs, ours = (state.get(f"{layer}.weight") for state in (given, own))
        if theirs is None or ours is None or theirs.shape[1:] != ours.shape[1:] or len(theirs) == len(ours):
            continue
        given = {**given, **{k: v for k, v in own.items() if k.startswith(f"{layer}.")}}
        notes.append(f"classifier {layer} was for {len(theirs)} classes: a new one for {len(ours)} takes its place")
    return given, notes
