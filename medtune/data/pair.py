"""What a data pair holds, and fixed smaller choices from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_SUBSET_SEED = 20_251  # fixed: every trial of every study sees the same subset, whatever its own seed


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 (N, C, H, W) and labels int64 (N,), in a fixed order. Arrays may be mapped from a file."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Split:
        """The images at these positions, copied."""
        return Split(np.ascontiguousarray(self.images[indices]), self.labels[indices].copy())


@dataclass(frozen=True, eq=False)
class PairData:
    """A training set with its official splits and the external set it is tested on."""

    name: str
    """Pair name, as in `available_pairs()`."""
    classes: tuple[str, ...]
    """Class names by label."""
    positive: int
    """Label of the positive class; of more than two classes none is, and figures are means over all."""
    native_size: int
    """Side of the training images in px, as published."""
    train: Split
    val: Split
    test: Split
    external: Split
    external_name: str
    """What the external figures were measured on; `cpn` for the verified CPN X-ray set alone."""
    verified_cpn: bool = False
    """True when, and only when, the external set is the published CPN X-ray set in full."""
    synthetic: bool = False
    """True for generated images: no figure from them says anything about patients."""
    warnings: tuple[str, ...] = ()
    """What the user must know about these files."""
    fingerprint: dict[str, str] = field(default_factory=dict)
    """Digest per split: equal digests are equal images and labels in equal order."""

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Images per class of every split."""
        splits = {"train": self.train, "val": self.val, "test": self.test, "external": self.external}
        return {name: class_counts(split.labels, len(self.classes)) for name, split in splits.items()}


def class_counts(labels: NDArray[np.int64], classes: int) -> tuple[int, ...]:
    """Images per class."""
    return tuple(int(n) for n in np.bincount(labels, minlength=classes))


def digest(split: Split) -> str:
    """SHA-256 over shape, labels and images."""
    sha = hashlib.sha256(repr(split.images.shape).encode())
    sha.update(np.ascontiguousarray(split.labels, dtype=np.int64).data)
    sha.update(np.ascontiguousarray(split.images).data)
    return sha.hexdigest()


def limit(data: PairData, *, train_limit: int | None, external_limit: int | None) -> PairData:
    """A smaller pair: at most `train_limit` training and `external_limit` external images; None keeps all.

    The training images are as many of each class as there are to be had; the external ones keep the class
    proportions. Both choices are fixed: they depend on the data and the limits alone.
    """
    classes = len(data.classes)
    if train_limit is not None and train_limit < len(data.train):
        chosen = _chosen(data.train.labels, _balanced(data.train.labels, train_limit, classes))
        data = _subset(data, "train", chosen, train_limit)
    if external_limit is not None and external_limit < len(data.external):
        data = _subset(data, "external", external_positions(data, external_limit), external_limit)
    return data


def external_positions(data: PairData, external_limit: int | None) -> NDArray[np.int64]:
    """Where the external images that `limit` keeps are in the whole set, rising: predictions are in this order."""
    if external_limit is None or external_limit >= len(data.external):
        return np.arange(len(data.external))
    return _chosen(data.external.labels, _stratified(data.external.labels, external_limit, len(data.classes)))


def _chosen(labels: NDArray[np.int64], shares: list[int]) -> NDArray[np.int64]:
    rng = np.random.default_rng(_SUBSET_SEED)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:share] for label, share in enumerate(shares)]
    return np.sort(np.concatenate(chosen))


def _subset(data: PairData, name: str, chosen: NDArray[np.int64], limit_: int) -> PairData:
    split: Split = getattr(data, name)
    part = split.take(chosen)
    mark = hashlib.sha256(f"{data.fingerprint.get(name, '')} {name} {limit_}".encode()).hexdigest()
    changes = {name: part, "fingerprint": {**data.fingerprint, name: mark}}
    return replace(data, **changes)  # type: ignore[arg-type]


def _balanced(labels: NDArray[np.int64], total: int, classes: int) -> list[int]:
    """Equal shares; what a small class cannot give, the others do."""
    have = class_counts(labels, classes)
    shares = [0] * classes
    for _ in range(total):
        open_classes = [c for c in range(classes) if shares[c] < have[c]]
        shares[min(open_classes, key=lambda c: shares[c])] += 1
    return shares


def _stratified(labels: NDArray[np.int64], total: int, classes: int) -> list[int]:
    """Proportional shares by largest remainder; a class that is there keeps at least one image."""
    have = class_counts(labels, classes)
    exact = [total * n / len(labels) for n in have]
    shares = [min(n, max(1, int(x))) if n else 0 for n, x in zip(have, exact, strict=True)]
    while sum(shares) < total:
        shares[max(range(classes), key=lambda c: (exact[c] - shares[c], -c))] += 1
    while sum(shares) > total:
        shares[max(range(classes), key=lambda c: (shares[c] - exact[c], shares[c]))] -= 1
    return shares


Verdict = Literal["ok", "note", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """What `medtune data check` found out about one file or folder."""

    file: str
    found: str
    expected: str
    verdict: Verdict


@dataclass(frozen=True)
class Place:
    """One place where files are looked for: what names it, where it is, what is there, and whether it is used."""

    what: str
    named_by: str
    path: str
    found: str
    used: bool
