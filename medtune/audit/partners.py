"""The image of one split that is most like each image of another (or of the same), by three measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medtune.audit.looks import WHOLE, Crop, Floats, digests, hashes, shrunk, vectors
from medtune.data import Split

_BLOCK = 1 << 24
"""Products at a time: 64 MiB, whatever the sizes of the splits."""
_MOST_ROWS = 512


@dataclass(frozen=True, eq=False)
class Partners:
    """For each of N images its likest in the other split: positions (N,), -1 where there is none, and how like."""

    exact: NDArray[np.int64]
    likest: NDArray[np.int64]
    correlation: Floats
    other_label: NDArray[np.int64]
    """The likest of those with another label."""
    other_correlation: Floats
    distance: NDArray[np.int64]
    """Fewest bits of the hash that differ, of 64."""


def partners(of: Split, among: Split, crops: Sequence[Crop], same: bool = False) -> Partners:
    """What `among` has that is like the images of `of`, of which `crops` are looked at.

    same: both are one split, where an image is not its own partner. Memory: the vectors of `among` (3 KiB an image, 9 in
    colour) and 64 MiB.
    """
    grey = of.images.shape[1] != among.images.shape[1]
    count = len(of)
    found = Partners(
        exact=_exact(of, among, grey, same),
        likest=np.full(count, -1),
        correlation=np.full(count, -1, np.float32),
        other_label=np.full(count, -1),
        other_correlation=np.full(count, -1, np.float32),
        distance=np.full(count, 64),
    )
    theirs = np.concatenate([vectors(among.images[rows], WHOLE[0], grey) for rows in _rows(len(among), 1)])
    their_hashes = np.concatenate([hashes(among.images[rows], WHOLE[0]) for rows in _rows(len(among), 1)])
    blocks = ((rows, shrunk(of.images[rows])) for rows in _rows(count, len(among)))
    for rows, images, crop in ((*block, crop) for block in blocks for crop in crops):
        products = vectors(images, crop, grey) @ theirs.T
        bits = hashes(images, crop) @ their_hashes.T
        if same:
            own = np.arange(len(images)), np.arange(rows.start, rows.start + len(images))
            products[own], bits[own] = -1, -64
        _improve(found.likest, found.correlation, rows, products)
        products[of.labels[rows, None] == among.labels] = -1
        _improve(found.other_label, found.other_correlation, rows, products)
        found.distance[rows] = np.minimum(found.distance[rows], (64 - bits.max(axis=1)).astype(np.int64) // 2)
    return found


def multiply_adds(of: Split, among: Split, crops: Sequence[Crop]) -> int:
    """What `partners` costs, roughly: hashing an image costs as much as some 1,000,000 of them."""
    channels = min(of.images.shape[1], among.images.shape[1])
    hashed = len(of) * len(crops) + len(among)
    return len(of) * len(among) * len(crops) * 784 * channels + 1_000_000 * hashed


def _rows(count: int, width: int) -> Iterator[slice]:
    step = max(1, min(_MOST_ROWS, _BLOCK // width))
    return (slice(start, min(count, start + step)) for start in range(0, count, step))


def _improve(positions: NDArray[np.int64], best: Floats, rows: slice, products: Floats) -> None:
    at = products.argmax(axis=1)
    values = products[np.arange(len(at)), at]
    better = values > best[rows]
    positions[rows] = np.where(better, at, positions[rows])
    best[rows] = np.where(better, values, best[rows])


def _exact(of: Split, among: Split, grey: bool, same: bool) -> NDArray[np.int64]:
    """Position of an image with equal pixels, at the smaller of both sides."""
    side = min(of.images.shape[-1], among.images.shape[-1])
    theirs: dict[bytes, list[int]] = {}
    for rows in _rows(len(among), 1):
        for position, key in enumerate(digests(among.images[rows], side, grey), rows.start):
            theirs.setdefault(key, []).append(position)
    found = np.full(len(of), -1)
    for rows in _rows(len(of), 1):
        for position, key in enumerate(digests(of.images[rows], side, grey), rows.start):
            others = (other for other in theirs.get(key, ()) if not (same and other == position))
            found[position] = next(others, -1)
    return found
