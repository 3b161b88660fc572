"""`medtune export`: a bundle, checked against the trial's own predictions, written whole or not at all."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import medtune
from medtune import models
from medtune.audit import sentence
from medtune.cluster import facts
from medtune.data import PairData, Split
from medtune.deploy import card, programs
from medtune.deploy.bundle import CARD, LIKENESS, MANIFEST, WEIGHTS, Bundle, seal
from medtune.deploy.elsewhere import named
from medtune.deploy.likeness import PERCENTILE, Reference, limit_of
from medtune.deploy.predictor import outputs
from medtune.deploy.source import Source, images_of
from medtune.errors import BundleError
from medtune.evaluate import default_device, resolve_precision
from medtune.models.cost import source as source_of

SAME = 1e-5
"""Most that logits may differ from the trial's own, per unit of the largest."""
MOST_KNOWN = 10_000
"""Training images whose features are kept at once: some thousand numbers each."""


def export(
    source: Source,
    folder: Path,
    data_dir: Path | None,
    external_dir: Path | None,
    tolerance: float = SAME,
    say: Callable[[str], object] = lambda words: None,
) -> Bundle:
    """Write a bundle to `folder`, which must be new or empty, and open it again. `say` hears what is done now.

    Raises BundleError for a folder with something in it, and where the weights do not give the trial's own predictions
    to `tolerance`; DataError for data that are missing or others.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder} is not empty: name a new folder with -o")
    data = images_of(source, data_dir, external_dir)
    there = folder.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder if there else folder.parent))
        try:
            _fill(part, source, data, tolerance, say)
            _put(part, folder, there)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"cannot write {folder}: {error.strerror or error}. Name another folder with -o") from None
    return Bundle.open(folder)


def _fill(part: Path, source: Source, data: PairData, tolerance: float, say: Callable[[str], object]) -> None:
    config, device = source.config, default_device()
    model = models.build(config.model, num_classes=len(data.classes), in_channels=3)
    models.load_published(model, source.weights)
    model = model.eval().requires_grad_(False).to(device)

    def computed(split: Split) -> tuple[NDArray[np.float32], torch.Tensor]:
        images = torch.tensor(np.asarray(split.images))
        return outputs(config.model, model, images, config.image_size, device, resolve_precision(config.precision, device))

    say("comparing logits with the trial's own")
    found = {name: computed(getattr(data, name)) for name in ("val", "external")}
    checks = _checks(source, {name: logits for name, (logits, _) in found.items()}, tolerance)
    known = _known(data.train)
    say(f"looking at {len(known)} training images, to tell what is unlike them")
    reference = Reference.of(computed(known)[1]).to(device)
    far = {name: reference.distances(features) for name, (_, features) in found.items()}
    save_file({name: tensor.contiguous() for name, tensor in source.weights.items()}, part / WEIGHTS)
    save_file({name: tensor.cpu() for name, tensor in reference.tensors().items()}, part / LIKENESS)
    say("writing programs: minutes for a model with a selective scan")
    about = {
        **_about(source, data, device, checks),
        "likeness": _likeness(far, len(known)),
        **programs.write(part, config.model, model.cpu(), config.image_size, data),
    }
    (part / CARD).write_text(card.render(about), encoding="utf-8")
    seal(part, about)


def _put(part: Path, folder: Path, there: bool) -> None:
    """Make a whole bundle in `part` the one in `folder`."""
    part.chmod(0o755)
    for file in part.iterdir():
        file.chmod(0o644)
    if not there:
        os.replace(part, folder)
        return
    # A folder that is there may be a mount, a link or where the user is: it stays. Without its manifest it is no bundle yet.
    for file in sorted(part.iterdir(), key=lambda file: file.name == MANIFEST):
        os.replace(file, folder / file.name)


def _checks(source: Source, found: dict[str, NDArray[np.float32]], tolerance: float) -> dict[str, Any]:
    """How far logits are from the trial's own, by split."""
    checks: dict[str, Any] = {}
    for name, logits in found.items():
        own = source.predictions[name].logits
        if own.shape != logits.shape:
            raise BundleError(f"the trial predicted {len(own)} {name} images, here there are {len(logits)}: other data")
        difference = float(np.abs(own - logits).max())
        most = tolerance * max(1.0, float(np.abs(own).max()))
        if not difference <= most:
            raise BundleError(
                f"the weights do not give the trial's own predictions: logits of {name} differ by up to {difference:.2g}, "
                f"at most {most:.2g} is taken for rounding. Another kind of device or precision computes otherwise: export "
                "on a machine like the trial's, or say with --tolerance what you accept; the card will state it"
            )
        checks[name] = {"images": len(own), "largest_difference": difference, "tolerance": most}
    return checks


def _about(source: Source, data: PairData, device: torch.device, checks: dict[str, Any]) -> dict[str, Any]:
    config, study = source.config, source.study
    threshold = source.decided["threshold"]
    package = facts.package() or {"digest": None}
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "study": study.name,
        "study_id": study.record["id"],
        "trial": source.trial,
        "run": source.run,
        "why": source.why,
        "cautions": [named(caution) for caution in source.cautions],
        "model": config.model,
        "model_source": source_of(config.model),
        "classes": list(data.classes),
        "config": config.to_dict() | {"pretrained": config.pretrained and named(config.pretrained)},
        "precision": resolve_precision(config.precision, device),
        "preprocessing": _preprocessing(data, config.image_size),
        "decision": {
            "temperature": source.decided["temperature"],
            "threshold": threshold["value"] if threshold else None,
            "rule": threshold["rule"] if threshold else "the most probable class",
            "set_on": "val",
        },
        "metrics": source.decided["figures"],
        "data": {
            **study.record["data"],
            "pair": data.name,
            "counts": data.counts(),
            "synthetic": data.synthetic,
            "warnings": [named(warning) for warning in data.warnings],
            "audit": sentence(study),
        },
        "checks": checks,
        "code": {"version": medtune.__version__, "digest": package["digest"]},
        "environment": {
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
            "packages": {name: facts.version(name) for name in facts.PACKAGES},
        },
    }


def _preprocessing(data: PairData, size: int) -> dict[str, Any]:
    """What is done to a file before the model sees it, in `deploy.images` and `data.transforms.prepare`."""
    channels, height, width = data.external.images.shape[1:]
    return {
        "channels": channels,
        "height": height,
        "width": width,
        "native_size": data.native_size,
        "image_size": size,
        "steps": [
            "the first image of a file with several, turned the way up that its EXIF says; alpha is left out",
            "8-bit levels; 16-bit ones above 255 are divided by 257, so levels of 10 or 12 bits must be scaled to 16 before",
            "grey levels (ITU-R 601)" if channels == 1 else "RGB",
            f"resize to {width} x {height} px with Pillow's bilinear filter, whatever the shape (squeezed, not cropped), "
            "rounded to whole levels, as the external test's images were; "
            f"one of {data.native_size} x {data.native_size} px, as the training images are, stays so",
            f"levels / 127.5 - 1, resized to {size} x {size} px, bilinear, antialiased, in float32"
            + (", the same in all three channels" if channels == 1 else ""),
        ],
    }


def _known(train: Split) -> Split:
    """Training images that others are held against: all, or as many of a large set as tell the same in bounded memory."""
    if len(train) <= MOST_KNOWN:
        return train
    return train.take(np.sort(np.random.default_rng(0).permutation(len(train))[:MOST_KNOWN]))


def _likeness(far: dict[str, NDArray[np.float64]], known: int) -> dict[str, Any]:
    limit = limit_of(far["val"])
    flagged = {name: float((distances > limit).mean()) for name, distances in far.items()}
    return {
        "measure": f"Mahalanobis distance under a probabilistic PCA of {known} training images' channel means and spreads "
        "after four blocks of the model",
        "limit": limit,
        "set_on": f"{PERCENTILE:g}th percentile of val",
        "flagged": flagged,
    }
