"""Prediction from a bundle: calibrated probabilities, the decision, and whether the image is like the training images."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn

from medtune import models
from medtune.config import Precision
from medtune.deploy.bundle import LIKENESS, WEIGHTS, Bundle
from medtune.deploy.images import as_tested
from medtune.deploy.likeness import Reference, features_of, joined
from medtune.errors import BundleError, MedtuneError
from medtune.evaluate import default_device, eval_batch, logits_of
from medtune.evidence.calibration import calibrated


@dataclass(frozen=True)
class Prediction:
    """What a bundle says of an image."""

    probabilities: Mapping[str, float]
    """By class, calibrated; they sum to 1."""
    decision: str
    """The positive class from the threshold on, else the other; of more than two the most probable."""
    threshold: float | None
    """None for more than two classes."""
    score: float
    """Probability of the positive class; of more than two classes, of the decided one."""
    unlike_training: bool
    """The image is farther from the training images than 99 % of the validation images: the rest says little of it."""
    distance: float
    """That distance; the bundle's manifest has the limit."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


class Predictor:
    """A loaded bundle; calls from several threads take turns."""

    def __init__(self, bundle: Bundle, model: nn.Module, reference: Reference, device: torch.device) -> None:
        self.bundle = bundle
        self.model = model
        self.reference = reference
        self.device = device
        self._turn = threading.Lock()

    @classmethod
    def load(cls, folder: Path, device: torch.device | str | None = None) -> Predictor:
        """A bundle's predictor, every byte verified. Raises BundleError for one that is missing or was changed."""
        bundle = Bundle.open(folder)
        where = torch.device(device) if device is not None else default_device()
        try:
            model = models.build(bundle.model, num_classes=len(bundle.classes), in_channels=3)
            models.load_published(model, load(bundle.content[WEIGHTS]))
        except MedtuneError as error:
            made = bundle.manifest["code"]["version"]
            raise BundleError(f"{folder} was made by medtune {made}, whose {bundle.model} is another: {error}") from None
        reference = Reference(**load(bundle.content[LIKENESS])).to(where)
        return cls(bundle, model.eval().requires_grad_(False).to(where), reference, where)

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Predictions for images uint8 (C, H, W) of any size, in order. Raises ImageError for what is no image."""
        if not images:
            return []
        stored = [self.prepared(image) for image in images]
        sides = [image.shape[1:] for image in stored]
        found: dict[int, Prediction] = {}
        for side in dict.fromkeys(sides):
            places = [place for place, own in enumerate(sides) if own == side]
            logits, features = self.outputs(torch.stack([stored[place] for place in places]))
            probs, far = calibrated(logits, self.bundle.temperature), self.reference.distances(features)
            found |= {
                place: self._prediction(row, float(distance))
                for place, row, distance in zip(places, probs, far, strict=True)
            }
        return [found[place] for place in range(len(images))]

    def prepared(self, image: NDArray[np.uint8]) -> Tensor:
        """An image as those of the external test were stored: uint8 (C, H, W). Raises ImageError for what is no image."""
        about = self.bundle.manifest["preprocessing"]
        sizes = (about["height"], about["width"], about["native_size"])
        return torch.from_numpy(as_tested(image, about["channels"], *sizes).copy())

    def outputs(self, images: Tensor) -> tuple[NDArray[np.float32], Tensor]:
        """Logits (B, K) of prepared images, and the features (B, D) that their likeness is told by."""
        with self._turn:
            about = self.bundle
            return outputs(about.model, self.model, images, about.image_size, self.device, about.manifest["precision"])

    def heat_map(self, image: NDArray[np.uint8]) -> Image.Image:
        """An image (C, H, W) with what speaks for the positive class laid over it; see `medtune.deploy.gradcam`."""
        from medtune.deploy.gradcam import overlay

        with self._turn:
            return overlay(self.bundle.model, self.model, self.prepared(image), self.bundle.image_size)

    def _prediction(self, probs: NDArray[np.float64], distance: float) -> Prediction:
        classes, positive, threshold = self.bundle.classes, self.bundle.positive, self.bundle.threshold
        if positive is None or threshold is None:
            decided = int(probs.argmax())
            score = probs[decided]
        else:
            score = probs[positive]
            decided = positive if score >= threshold else 1 - positive
        return Prediction(
            probabilities={name: float(p) for name, p in zip(classes, probs, strict=True)},
            decision=classes[decided],
            threshold=threshold,
            score=float(score),
            unlike_training=distance > self.bundle.manifest["likeness"]["limit"],
            distance=distance,
        )


def outputs(
    name: str, model: nn.Module, images: Tensor, size: int, device: torch.device, precision: Precision
) -> tuple[NDArray[np.float32], Tensor]:
    """Logits (N, K) of uint8 images (N, C, H, W), and their features (N, D) on the device; a batch at a time."""
    with features_of(name, model) as found:
        logits = logits_of(model, iter(images.split(eval_batch(size, device))), size, device, precision)
    return logits.cpu().numpy(), joined(found)
