"""Logits of a split, and the figures of a model on it: the external test, the own test, any checkpoint's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from medtune import metrics
from medtune.config import Precision, TrialConfig
from medtune.data import PairData, Split
from medtune.errors import MedtuneError

BOOTSTRAP_SEED = 0
"""One seed for all trials: their intervals come from the same resamples."""


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Literal["bf16", "fp32"]:
    """`auto` is bf16 on GPUs of compute capability 8 and above, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """bf16 autocast, or its absence, as `precision` says for the device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(precision, device) == "bf16")


def predict(
    model: nn.Module,
    split: Split,
    size: int,
    device: torch.device,
    precision: Precision = "auto",
    *,
    matched: int | None = None,
) -> Tensor:
    """Logits (N, K), float32 on the CPU, of a split's images resized to `size`; in eval mode, which is undone after.

    matched: first bring the images down to this side in px.
    """
    batch = 256 if device.type == "cuda" else 64
    parts = (torch.tensor(split.images[i : i + batch]) for i in range(0, len(split.labels), batch))
    return logits_of(model, parts, size, device, precision, matched=matched).cpu()


def logits_of(
    model: nn.Module,
    batches: Iterator[Tensor],
    size: int,
    device: torch.device,
    precision: Precision,
    *,
    matched: int | None = None,
) -> Tensor:
    """Logits (N, K), float32 on the device, of batches of uint8 images (B, C, H, W)."""
    from medtune.data.transforms import match_resolution, prepare

    logits: list[Tensor] = []
    with evaluating(model), torch.inference_mode(), autocast(precision, device):
        for images in batches:
            images = images.to(device, non_blocking=True)
            if matched is not None:
                images = match_resolution(images, matched)
            logits.append(model(prepare(images, size)).float())
    return torch.cat(logits)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and back."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def figures(
    logits: Tensor, labels: np.ndarray, prefix: str, *, loss: bool, resamples: int | None = None
) -> dict[str, Any]:
    """Flat figures `prefix/auc`, ... of logits (N, K): None where undefined, then with `prefix/auc/reason`.

    With `resamples` each has `prefix/auc/low` and `prefix/auc/high`, its 95 % interval, as well.
    Raises MedtuneError for logits that are not finite.
    """
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).any(dim=1).sum())
        raise MedtuneError(f"the model's output is not finite for {bad} of {len(logits)} {prefix} images")
    probs = metrics.softmax(logits.numpy())
    result: dict[str, Any] = {f"{prefix}/loss": metrics.cross_entropy(logits.numpy(), labels)} if loss else {}
    bounds = metrics.intervals(probs, labels, resamples, BOOTSTRAP_SEED) if resamples else {}
    reasons = metrics.undefined(labels, probs.shape[1])
    for name, value in metrics.classification(probs, labels).items():
        result[f"{prefix}/{name}"] = value
        if name in reasons:
            result[f"{prefix}/{name}/reason"] = reasons[name]
        if resamples:
            low, high = bounds[name] or (None, None)
            result |= {f"{prefix}/{name}/low": low, f"{prefix}/{name}/high": high}
    return result


def curves(logits: Tensor, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """For plots: `roc` of class 1 (fpr, tpr), `confusion` (rows true, columns decided), `classes`."""
    probs = metrics.softmax(logits.numpy())
    confusion = metrics.confusion(probs, labels).tolist()
    return {"roc": metrics.roc(probs, labels), "confusion": confusion, "classes": list(classes)}


def external_test(model: nn.Module, config: TrialConfig, data: PairData, device: torch.device) -> dict[str, Any]:
    """Figures with intervals on the external set: images as they are, and `external_matched/*`.

    Matched images are brought down to the training images' native size first. The whole of `data.external` is used;
    `config.external_limit` is `medtune.data.limit`'s to apply. `cpn/*` copies exist only for the verified CPN X-ray
    set.
    "curves" holds ROC and confusion as they are, and under "matched" those of the matched images.
    """
    split = data.external
    result: dict[str, Any] = {"external/n": len(split.labels), "external/name": data.external_name}
    shapes: dict[str, Any] = {}
    for prefix, matched in (("external", None), ("external_matched", data.native_size)):
        logits = predict(model, split, config.image_size, device, config.precision, matched=matched)
        found = figures(logits, split.labels, prefix, loss=False, resamples=config.resamples)
        result |= found
        if data.verified_cpn:
            result |= {f"cpn{key.removeprefix('external')}": value for key, value in found.items()}
        plots = curves(logits, split.labels, data.classes)
        shapes = plots if matched is None else {**shapes, "matched": plots}
    return {**result, "curves": shapes}


def own_test(model: nn.Module, config: TrialConfig, data: PairData, device: torch.device) -> dict[str, Any]:
    """Figures `test/*` with loss and intervals on the training set's own test split."""
    logits = predict(model, data.test, config.image_size, device, config.precision)
    found = figures(logits, data.test.labels, "test", loss=True, resamples=config.resamples)
    return {"test/n": len(data.test.labels), **found}
