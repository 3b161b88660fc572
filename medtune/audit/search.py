"""Near-duplicates within and between the splits of a pair, with what is usual for its images beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtune.audit.looks import CROPS, WHOLE
from medtune.audit.partners import Partners, multiply_adds, partners
from medtune.audit.verdict import THRESHOLD
from medtune.audit.words import words
from medtune.data import PairData, Split

DISTANCE = 2
"""Bits of 64 by which their hashes may differ at most."""
USUAL = 0.05
"""Where a larger share of the test images has a partner in train, correlation tells copies from others no more."""
WORST = 12
"""Pairs of images that are listed for each pair of splits."""

PAIRS = (
    *(("external", name) for name in ("train", "val", "test")),
    *(("val", "train"), ("test", "train"), ("test", "val")),
    *((name, name) for name in ("train", "val", "test", "external")),
)
"""(of, among): which images of the first have a partner in the second."""


def own_test(data: PairData) -> bool:
    """Whether the external set is the training set's own test split."""
    return data.fingerprint.get("external") == data.fingerprint.get("test") and data.fingerprint != {}


def cost(data: PairData) -> int:
    """What `audit` costs, in multiply-adds."""
    return sum(multiply_adds(_split(data, of), _split(data, among), _crops(of, among)) for of, among in _pairs(data))


def audit(data: PairData, threshold: float = THRESHOLD, say: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """All there is to say of a pair's near-duplicates, in plain values; `medtune.audit` names the keys.

    `say` hears of each pair of splits before it is searched.
    """
    found: dict[tuple[str, str], Partners] = {}
    for of, among in _pairs(data):
        say(f"{of} in {among}: {len(_split(data, of))} x {len(_split(data, among))} images")
        found[of, among] = partners(_split(data, of), _split(data, among), _crops(of, among), same=of == among)
    say("test in train once more, looked at as the external images were: what is usual")
    baseline = _counts(partners(data.test, data.train, CROPS), threshold, usual=False)
    usual = baseline["correlated"] > USUAL * baseline["of"]
    near = {pair: _near(one, threshold, usual) for pair, one in found.items()}
    of_training = [near["external", name] for name in ("train", "val", "test") if ("external", name) in near]
    record = {
        "pair": data.name,
        "external_name": data.external_name,
        "digests": dict(data.fingerprint),
        "threshold": threshold,
        "distance": DISTANCE,
        "images": {name: len(_split(data, name)) for name in ("train", "val", "test", "external")},
        "own_test": own_test(data),
        "leaked": {f"{of} in {among}": _counts(one, threshold, usual) for (of, among), one in found.items()},
        "baseline": {name: value / baseline["of"] for name, value in baseline.items() if name != "of"},
        "usual": usual,
        "external_leaked": np.flatnonzero(np.any(of_training, axis=0)).tolist(),
        "external_seen": np.flatnonzero(near["external", "train"] | near["external", "val"]).tolist(),
        "worst": [one for pair in found for one in _worst(data, pair, found[pair], near[pair])],
    }
    return {**record, "words": words(record)}


def _pairs(data: PairData) -> list[tuple[str, str]]:
    again = {("external", "test"), ("external", "external")} if own_test(data) else set()
    return [pair for pair in PAIRS if pair not in again]


def _split(data: PairData, name: str) -> Split:
    split: Split = getattr(data, name)
    return split


def _crops(of: str, among: str) -> tuple[tuple[float, float], ...]:
    """Images of one set were all made small in one way."""
    return CROPS if of == "external" != among else WHOLE


def _near(one: Partners, threshold: float, usual: bool) -> NDArray[np.bool_]:
    return (one.exact >= 0) | ((one.correlation > threshold) & (not usual))


def _counts(one: Partners, threshold: float, usual: bool) -> dict[str, int]:
    flags = {
        "exact": one.exact >= 0,
        "perceptual": one.distance <= DISTANCE,
        "correlated": one.correlation > threshold,
        "near": _near(one, threshold, usual),
        "other_label": (one.other_correlation > threshold) & (not usual),
    }
    return {"of": len(one.exact), **{name: int(flag.sum()) for name, flag in flags.items()}}


def _worst(data: PairData, pair: tuple[str, str], one: Partners, near: NDArray[np.bool_]) -> list[Mapping[str, Any]]:
    """The likest pairs of images, those with two labels first; within a split each is told once."""
    listed: list[Mapping[str, Any]] = []
    told: set[frozenset[int]] = set()
    conflict = near & (one.other_correlation >= one.correlation - 1e-3)
    for index in sorted(np.flatnonzero(near), key=lambda i: (not conflict[i], -one.correlation[i])):
        partner = one.exact[index] if one.exact[index] >= 0 else one.likest[index]
        partner = int(one.other_label[index] if conflict[index] else partner)
        both = frozenset((int(index), partner))
        if pair[0] == pair[1] and both in told:
            continue
        told.add(both)
        of, among = (_split(data, name) for name in pair)
        listed.append(
            {
                "of": pair[0],
                "index": int(index),
                "among": pair[1],
                "partner": partner,
                "correlation": round(float(one.correlation[index]), 4),
                "exact": bool(one.exact[index] >= 0),
                "labels": [data.classes[of.labels[index]], data.classes[among.labels[partner]]],
            }
        )
        if len(listed) == WORST:
            break
    return listed
