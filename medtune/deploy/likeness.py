"""Whether an image is like the training images: its distance from them in what the model makes of it.

The distance is to the `NEIGHBOURS`-th nearest training image, between the features that the model's last layer takes, each
scaled to length 1 (Sun et al. 2022, arXiv:2204.06507). Beyond the 99th percentile of the validation images' distances an
image is flagged: about one in a hundred of the training set's own kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medtune.models.published import CLASSIFIERS

NEIGHBOURS = 5
PERCENTILE = 99.0


def last_layer(model: nn.Module) -> nn.Module:
    """The layer that gives the logits."""
    named = dict(model.named_modules())
    return next(named[name] for name in CLASSIFIERS if isinstance(named.get(name), nn.Linear))


@contextlib.contextmanager
def features_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the last layer takes, (B, C) for each batch that goes through the model."""
    found: list[Tensor] = []
    hook = last_layer(model).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach().float()))
    try:
        yield found
    finally:
        hook.remove()


def scaled(features: Tensor) -> Tensor:
    """Features (N, C) at length 1."""
    return F.normalize(features.float(), dim=1)


def distances(features: Tensor, training: Tensor) -> NDArray[np.float64]:
    """Distances (N,) of features (N, C) from the training images' (M, C), both scaled."""
    count = min(NEIGHBOURS, len(training))
    nearest = torch.cdist(features, training, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(count, dim=1)
    return nearest.values.cpu().numpy().astype(np.float64)


def limit_of(validation: NDArray[np.float64]) -> float:
    """The distance beyond which an image is flagged, from the validation images' distances (N,)."""
    return float(np.percentile(validation, PERCENTILE))
