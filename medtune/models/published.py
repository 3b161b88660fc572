"""Loading weights that others trained: the layouts their checkpoints come in, and errors that name every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from medtune.errors import CheckpointError

Shape = tuple[int, ...]

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
CLASSIFIERS = ("head", "fc", "proj_head.0", "classifier.head")
"""What the models call the layer that gives the logits."""
COUNTER = "num_batches_tracked"
MOST = 8
"""Keys of a kind that an error names."""


def load_published(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a checkpoint's tensors, in the published layout or ours, into `model`, all or nothing.

    Keys are the same in both layouts. A "module." in front of every key (DataParallel) and one level of wrapping
    ({"state_dict": ...}) are taken off; BatchNorm's step counters may be missing, as in old checkpoints.
    Raises CheckpointError that counts missing, unexpected and wrongly shaped keys and names the first `MOST` of each.
    """
    given, own = tensors(state_dict), model.state_dict()
    require_same(given, own)
    model.load_state_dict({**own, **given})


def require_same(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless a checkpoint's tensors have the names and shapes of a model's own."""
    missing = [k for k in own if k not in given and not k.endswith(COUNTER)]
    unexpected = [k for k in given if k not in own]
    shapes = [(k, tuple(given[k].shape), tuple(v.shape)) for k, v in own.items() if k in given]
    wrong = [(k, theirs, ours) for k, theirs, ours in shapes if theirs != ours]
    if missing or unexpected or wrong:
        first = next((k for k, v in own.items() if v.dim() == 4), None)
        raise CheckpointError(_explain(missing, unexpected, wrong, first))


def tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, without what is wrapped round them."""
    for name in WRAPPERS:
        if isinstance(state_dict.get(name), Mapping):
            return tensors(state_dict[name])
    found = {k: v for k, v in state_dict.items() if isinstance(v, Tensor)}
    if found and all(k.startswith("module.") for k in found):
        found = {k.removeprefix("module."): v for k, v in found.items()}
    return found


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - MOST} more" if len(keys) > MOST else ""
    return ", ".join(keys[:MOST]) + more


def _explain(
    missing: list[str], unexpected: list[str], wrong: list[tuple[str, Shape, Shape]], input_convolution: str | None
) -> str:
    lines = ["the checkpoint does not fit the model:"]
    for kind, keys in (("missing in the checkpoint", missing), ("unknown to the model", unexpected)):
        if keys:
            lines.append(f"  {kind} ({len(keys)}): {_some(keys)}")
    if len(wrong) > MOST:
        lines.append(f"  {len(wrong)} shapes differ, the first {MOST}:")
    for key, theirs, ours in wrong[:MOST]:
        lines.append(f"  shape of {key}: {theirs} in the checkpoint, {ours} in the model")
        if key == input_convolution and theirs[:1] + theirs[2:] == ours[:1] + ours[2:]:
            lines.append(f"  the checkpoint is for images of {theirs[1]} channels, the model for {ours[1]}")
        if key.removesuffix(".weight") in CLASSIFIERS and theirs[1:] == ours[1:]:
            hint = f"build(num_classes={theirs[0]})"
            lines.append(f"  the checkpoint is for {theirs[0]} classes, the model for {ours[0]}: {hint}")
    return "\n".join(lines)
