"""Logits of a split, and the figures of a model on it: the external test, the own test, any checkpoint's."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from medtune import metrics, models
from medtune.audit.dropped import leak_figures
from medtune.config import Precision, TrialConfig
from medtune.data import PairData, Split, limit, load_pair
from medtune.errors import CheckpointError, MedtuneError
from medtune.memory import is_out_of_memory
from medtune.models.layout import to_device
from medtune.predictions import Predicted
from medtune.weights import load_weights

if TYPE_CHECKING:
    from medtune.data.shifts import Shift

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


def eval_batch(size: int, device: torch.device) -> int:
    """Images at a time for evaluation: many on a GPU, few large ones on a CPU, where memory is the trial's neighbours'."""
    if device.type == "cuda":
        return 256
    return 64 if size <= 64 else 16


def predict(
    model: nn.Module,
    split: Split,
    size: int,
    device: torch.device,
    precision: Precision = "auto",
    *,
    matched: int | None = None,
    shift: Shift | None = None,
) -> Tensor:
    """Logits (N, K), float32 on the CPU, of a split's images resized to `size`; in eval mode, which is undone after.

    matched: first bring the images down to this side in px. shift: first change them so (`medtune.data.shifts`).
    """
    batch = eval_batch(size, device)
    parts = (torch.tensor(split.images[i : i + batch]) for i in range(0, len(split.labels), batch))
    return logits_of(model, parts, size, device, precision, matched=matched, shift=shift).cpu()


def logits_of(
    model: nn.Module,
    batches: Iterator[Tensor],
    size: int,
    device: torch.device,
    precision: Precision,
    *,
    matched: int | None = None,
    shift: Shift | None = None,
    first: int = 0,
) -> Tensor:
    """Logits (N, K), float32 on the device, of batches of uint8 images (B, C, H, W).

    matched, shift: what is done to the images before. first: the first image's index in its split, for shifts.
    A batch that does not fit into the device's memory is taken in halves, and so are those after it.
    """
    from medtune.data.transforms import match_resolution

    logits: list[Tensor] = []
    most: int | None = None
    with evaluating(model), torch.inference_mode(), autocast(precision, device):
        for images in batches:
            images = images.to(device, non_blocking=True)
            if shift is not None:
                images = shift(images, first)
            if matched is not None:
                images = match_resolution(images, matched)
            first += len(images)
            done = 0
            while done < len(images):
                part = images[done : done + (most or len(images))]
                output = _unless_full(model, part, size)
                if output is None:
                    most = len(part) // 2
                    gc.collect()
                    torch.cuda.empty_cache()
                    continue
                logits.append(output.float())
                done += len(part)
    return torch.cat(logits)


def _unless_full(model: nn.Module, images: Tensor, size: int) -> Tensor | None:
    """The model's output for uint8 images; None when it takes more memory than there is and fewer images may do."""
    from medtune.data.transforms import prepare

    try:
        output: Tensor = model(prepare(images, size))
        return output
    except Exception as error:
        if len(images) == 1 or not is_out_of_memory(error):
            raise
    return None


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

    With `resamples` each has `prefix/auc/low` and `prefix/auc/high`, its 95 % interval, as well. Two classes also have
    `prefix/auc_logit`, the AUC as the report's scripts computed it: ranked by the raw logit of class 1.
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
    if probs.shape[1] == 2:
        result[f"{prefix}/auc_logit"] = metrics.auc_of_logit(logits.numpy(), labels)
    return result


def curves(logits: Tensor, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """For plots: `roc` of class 1 (fpr, tpr), `confusion` (rows true, columns decided), `classes`.

    More than two classes have `rocs` instead: a curve per class against the rest, in their order.
    """
    probs = metrics.softmax(logits.numpy())
    shapes = {"confusion": metrics.confusion(probs, labels).tolist(), "classes": list(classes)}
    if len(classes) == 2:
        return {"roc": metrics.roc(probs, labels), **shapes}
    return {"rocs": [metrics.roc(probs, labels, positive=label) for label in range(len(classes))], **shapes}


def external_test(model: nn.Module, config: TrialConfig, data: PairData, device: torch.device) -> dict[str, Any]:
    """Figures with intervals on the external set: images as they are, and `external_matched/*`.

    Matched images are brought down to the training images' native size first. The whole of `data.external` is used;
    `config.external_limit` is `medtune.data.limit`'s to apply. `cpn/*` copies exist only for the verified CPN X-ray
    set.
    "curves" holds ROC and confusion as they are, and under "matched" those of the matched images; "predictions" both
    sets' logits.
    """
    split = data.external
    result: dict[str, Any] = {"external/n": len(split.labels), "external/name": data.external_name}
    shapes: dict[str, Any] = {}
    predictions: dict[str, Predicted] = {}
    for prefix, matched in (("external", None), ("external_matched", data.native_size)):
        logits = predict(model, split, config.image_size, device, config.precision, matched=matched)
        found = figures(logits, split.labels, prefix, loss=False, resamples=config.resamples)
        result |= found
        if data.verified_cpn:
            result |= {f"cpn{key.removeprefix('external')}": value for key, value in found.items()}
        plots = curves(logits, split.labels, data.classes)
        shapes = plots if matched is None else {**shapes, "matched": plots}
        predictions[prefix] = Predicted(logits.numpy(), split.labels)
    return {**result, "curves": shapes, "predictions": predictions}


def shift_figures(logits: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """`val_shift/*`, the mean over the shifts of each figure; logits (S N, K) shift by shift, labels (N,) of one."""
    each = [figures(part, labels, "val_shift", loss=True) for part in logits.split(len(labels))]
    return {
        name: value if value is None or isinstance(value, str) else float(np.mean([found[name] for found in each]))
        for name, value in each[0].items()
    }


def shift_test(model: nn.Module, config: TrialConfig, data: PairData, device: torch.device) -> dict[str, Any]:
    """Figures `val_shift/*` of the val images under every simulated shift; "predictions": all logits, shift by shift."""
    from medtune.data.shifts import SHIFTS

    split = data.val
    shifted = (predict(model, split, config.image_size, device, config.precision, shift=s) for s in SHIFTS.values())
    logits = torch.cat(list(shifted))
    predictions = {"val_shift": Predicted(logits.numpy(), np.tile(split.labels, len(SHIFTS)))}
    return {**shift_figures(logits, split.labels), "predictions": predictions}


def own_test(model: nn.Module, config: TrialConfig, data: PairData, device: torch.device) -> dict[str, Any]:
    """Figures `test/*` with loss and intervals on the training set's own test split; "predictions": its logits and val's."""
    predictions = {}
    for name, split in (("val", data.val), ("test", data.test)):
        logits = predict(model, split, config.image_size, device, config.precision)
        predictions[name] = Predicted(logits.numpy(), split.labels)
    found = figures(logits, data.test.labels, "test", loss=True, resamples=config.resamples)
    return {"test/n": len(data.test.labels), **found, "predictions": predictions}


def evaluate_checkpoint(
    path: Path,
    *,
    model: str | None = None,
    pair: str | None = None,
    native_size: int | None = None,
    image_size: int | None = None,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
    external_limit: int | None = None,
    drop_leaked: bool = False,
    resamples: int = 1000,
    precision: Precision = "auto",
    device: torch.device | None = None,
) -> dict[str, Any]:
    """All figures of a checkpoint, ours or published: `val/*`, `test/*`, `external/*`, `external_matched/*`, "curves".

    Ours know their model, pair and sizes; published weights need `model` (the rest: 224 px, pneumoniamnist-cpn, 28 px).
    All external images are tested unless `external_limit` says less. "leaks" is the verdict on the pair, if it was audited;
    with `drop_leaked` it is, and "without_leaked" has the external figures without leaked images (`medtune.audit.dropped`).
    Raises CheckpointError for a file that cannot be read or is of another model, DataError for data that are missing.
    """
    path = Path(path)
    device = device or default_device()
    weights, about = load_weights(path)
    config = _config_of(path, about, model)
    given = {"pair": pair, "native_size": native_size, "image_size": image_size}
    changes = {name: value for name, value in given.items() if value is not None}
    config = config.replace(**changes, resamples=resamples, precision=precision)
    data = load_pair(config.pair, native_size=config.native_size, data_dir=data_dir, external_dir=external_dir)
    whole = data
    data = limit(data, train_limit=None, external_limit=external_limit)
    network = models.build(config.model, num_classes=len(data.classes), in_channels=3)
    try:
        models.load_published(network, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path} as {config.model}: {error}") from error
    network = to_device(network, device)
    logits = predict(network, data.val, config.image_size, device, precision)
    external = external_test(network, config, data, device)
    leaks = leak_figures(whole, external["predictions"], external_limit, resamples, drop_leaked)
    tests = own_test(network, config, data, device) | external
    del tests["predictions"]
    return {
        **leaks,
        "checkpoint": str(path),
        "model": config.model,
        "epoch": about["epoch"] if about else None,
        "pair": data.name,
        "native_size": config.native_size,
        "image_size": config.image_size,
        "precision": resolve_precision(precision, device),
        "synthetic": data.synthetic,
        "warnings": [*data.warnings, *_other_data(about, config, data)],
        "val/n": len(data.val.labels),
        **figures(logits, data.val.labels, "val", loss=True, resamples=resamples),
        **tests,
    }


def _config_of(path: Path, about: dict[str, Any] | None, model: str | None) -> TrialConfig:
    if about is None:
        if model is None:
            names = ", ".join(models.available())
            raise CheckpointError(f"{path} does not say which model it is of: name it with --model (one of {names})")
        return TrialConfig(model=model)
    config = TrialConfig.from_dict(about["config"])
    if model not in (None, config.model):
        raise CheckpointError(f"{path} is of model {config.model}, not {model}: leave --model out")
    return config


def _other_data(about: dict[str, Any] | None, config: TrialConfig, data: PairData) -> list[str]:
    if about is None or config.pair != about["config"]["pair"] or config.native_size != about["config"]["native_size"]:
        return []
    if about["fingerprint"].get("val") == data.fingerprint.get("val"):
        return []
    return ["the validation images are not those that this checkpoint was selected on"]
