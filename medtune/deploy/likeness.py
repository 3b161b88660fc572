"""Whether an image is like the training images: how far it is from them in what the model makes of it.

Measured: mean and spread over the positions of each channel after four blocks, evenly spaced through the model. Distance:
Mahalanobis under a probabilistic PCA of the training images' (Tipping & Bishop 1999), per root of the dimension. Beyond the
99th percentile of the validation images' distances an image is flagged: about one in a hundred of the set's own kind.

What is kept are means, axes and lengths, no image. Tried beside it on an X-ray study, and worse at photographs and
black images: the last layer's features by nearest neighbour (arXiv:2204.06507) and by Mahalanobis distance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medtune.deploy.layers import blocks_of, to_maps

COMPONENTS = 64
PERCENTILE = 99.0
PLACES = 4


@contextlib.contextmanager
def features_of(name: str, model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collects a list for each of `PLACES` blocks, with (B, 2 C) for each batch that goes through the model."""
    blocks = blocks_of(name, model)
    found: list[list[Tensor]] = [[] for _ in range(PLACES)]

    def collect(place: int, output: Tensor) -> None:
        maps = to_maps(name, output.detach().float()).flatten(2)
        found[place].append(torch.cat((maps.mean(2), maps.std(2, correction=0)), dim=1))

    hooks = [
        blocks[len(blocks) * (place + 1) // PLACES - 1].register_forward_hook(
            lambda _, inputs, output, place=place: collect(place, output)
        )
        for place in range(PLACES)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def joined(found: list[list[Tensor]]) -> Tensor:
    """What was collected, as features (N, D)."""
    return torch.cat([torch.cat(place) for place in found], dim=1)


@dataclass(frozen=True, eq=False)
class Reference:
    """The training images' features, summed up."""

    mean: Tensor
    spread: Tensor
    """Both (D,)."""
    axes: Tensor
    """(P, D), the principal ones of the features that are scaled to mean 0 and spread 1."""
    lengths: Tensor
    """Variance along each, (P,), and along every other direction, last: (P + 1,)."""

    @classmethod
    def of(cls, features: Tensor) -> Reference:
        """From the training images' features (N, D), N at least 3."""
        from sklearn.decomposition import PCA  # slow to import, and nothing that a served bundle needs

        values = features.double().cpu().numpy()
        mean, spread = values.mean(axis=0), values.std(axis=0) + 1e-6
        count = min(COMPONENTS, len(values) - 2, values.shape[1] - 1)
        pca = PCA(count, svd_solver="randomized", random_state=0).fit((values - mean) / spread)
        lengths = np.append(pca.explained_variance_, pca.noise_variance_).clip(1e-9)
        return cls(*(torch.from_numpy(part.astype(np.float32)) for part in (mean, spread, pca.components_, lengths)))

    def to(self, device: torch.device) -> Reference:
        return Reference(**{name: tensor.to(device) for name, tensor in asdict(self).items()})

    def tensors(self) -> Mapping[str, Tensor]:
        """By name, for a file; `Reference(**tensors)` is the way back."""
        return {name: tensor.contiguous() for name, tensor in asdict(self).items()}

    def distances(self, features: Tensor) -> NDArray[np.float64]:
        """Distances (N,) of features (N, D): about 1 for the training images themselves."""
        scaled = (features - self.mean) / self.spread
        along = scaled @ self.axes.T
        rest = (scaled - along @ self.axes).square().sum(1) / self.lengths[-1]
        total = (along.square() / self.lengths[:-1]).sum(1) + rest
        return (total / features.shape[1]).sqrt().double().cpu().numpy()


def limit_of(validation: NDArray[np.float64]) -> float:
    """The distance beyond which an image is flagged, from the validation images' distances (N,)."""
    return float(np.percentile(validation, PERCENTILE))
