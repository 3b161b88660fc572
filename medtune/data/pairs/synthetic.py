"""Generated chest-like images in two domains, for tests and first runs: no figure from them says anything of patients.

Bright body, two dark lungs with ribs, heart and spine; pneumonia is one to three soft opacities in the lungs, some
hardly stronger than what healthy lungs show. The external domain has its own exposure, contrast, geometry, sharper
ribs, stronger noise and a side marker, at 256x256, as CPN X-ray differs from PneumoniaMNIST.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtune.data.pair import Finding, PairData, Place, Split
from medtune.data.registry import Urls

NAME = "synthetic"
SIZES = {"train": (264, 760), "val": (66, 190), "test": (96, 160), "external": (200, 200)}
"""Normal and pneumonia images per split; train, val and test in PneumoniaMNIST's proportions."""
EXTERNAL_SIDE = 256
_VERSION = "1"  # part of the fingerprint: raise it when the images change
_CHUNK = 64
_GRAIN = 1 << 19  # noise values, of which each image takes a stretch

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Domain:
    """How a hospital's images look."""

    detail: int
    """Side in px that anatomy is drawn at; it is smooth, so larger images are enlarged from it."""
    lung_height: float
    ribs: float
    contrast: float
    brightness: float
    gamma: float
    noise: float
    marker: bool


TRAINING = Domain(
    detail=64, lung_height=0.62, ribs=0.05, contrast=1.0, brightness=0.0, gamma=1.0, noise=0.03, marker=False
)
OUTSIDE = Domain(
    detail=96, lung_height=0.70, ribs=0.09, contrast=1.2, brightness=-0.06, gamma=0.85, noise=0.05, marker=True
)


def load(
    *, native_size: int, data_dir: Path | None, external_dir: Path | None, external_fallback: bool
) -> PairData:
    """The generated pair; needs no files and ignores where they would be."""
    return generate(seed=0, native_size=native_size)


def get(*, native_size: int, data_dir: Path | None, urls: Urls | None) -> Iterator[str]:
    """Nothing to download."""
    yield "synthetic images are generated: there is nothing to get"


def check(*, native_size: int, data_dir: Path | None, external_dir: Path | None) -> list[Finding]:
    """Generate and count."""
    counts = "; ".join(f"{name} {sum(n)}" for name, n in generate(0, native_size).counts().items())
    return [Finding("(generated)", counts, "no file", "ok")]


def where(*, data_dir: Path | None, external_dir: Path | None) -> list[Place]:
    """No folder is looked at."""
    return [Place("synthetic pair", "its name", "(generated)", "made when loaded", True)]


@lru_cache(maxsize=2)
def generate(seed: int = 0, native_size: int = 28) -> PairData:
    """Training images (N, 1, native_size, native_size) and external ones (400, 1, 256, 256), by `seed` alone."""
    splits = {}
    for name, counts in SIZES.items():
        rng = np.random.default_rng([seed, *name.encode()])
        labels = rng.permutation(np.repeat(np.arange(2), counts))
        outside = name == "external"
        images = draw(labels, EXTERNAL_SIDE if outside else native_size, OUTSIDE if outside else TRAINING, rng)
        splits[name] = Split(images, labels)
    return PairData(
        name=NAME,
        classes=("normal", "pneumonia"),
        positive=1,
        native_size=native_size,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        external=splits["external"],
        external_name="synthetic",
        synthetic=True,
        warnings=("synthetic images: generated, no figure from them says anything about patients",),
        # Not of the pixels: another CPU's rounding may move one by a grey level.
        fingerprint={name: f"synthetic-{_VERSION}-{seed}-{native_size}-{name}" for name in splits},
    )


def draw(labels: NDArray[np.int64], side: int, domain: Domain, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images uint8 (N, 1, side, side) for these labels."""
    detail = min(side, domain.detail)
    grain = (domain.noise * 255 * rng.standard_normal(_GRAIN, dtype=np.float32)).astype(np.float32)
    out = np.empty((len(labels), 1, side, side), np.uint8)
    for start in range(0, len(labels), _CHUNK):
        part = labels[start : start + _CHUNK]
        images = _enlarged(_exposed(_anatomy(part, detail, domain, rng), domain, rng), side)
        if domain.marker:
            mark = side // 12
            images[:, mark : 2 * mark, mark : 2 * mark] = 240
        for image, offset in zip(images, rng.integers(0, _GRAIN - side * side, len(part)), strict=True):
            image += grain[offset : offset + side * side].reshape(side, side)
        np.clip(images, 0, 255, out=images)
        out[start : start + _CHUNK, 0] = images
    return out


def _anatomy(labels: NDArray[np.int64], side: int, domain: Domain, rng: np.random.Generator) -> Floats:
    """Density in about 0 to 1, float32 (N, side, side)."""
    n = len(labels)

    def each(low: float, high: float) -> Floats:
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    axis = ((np.arange(side) + 0.5) * 2 / side - 1).astype(np.float32)
    x = axis[None, None, :] + each(-0.06, 0.06)
    y = axis[None, :, None] + each(-0.06, 0.06)
    body = _ellipse(x / 1.05, y / 1.25, 6)
    gap, width, height = each(0.40, 0.46), each(0.29, 0.35), domain.lung_height * each(0.92, 1.08)
    lungs = np.maximum(_ellipse((x - gap) / width, y / height, 4), _ellipse((x + gap) / width, y / height, 4))
    bend, phase = each(0.3, 0.5), each(0, 6.28)
    ribs = np.cos(6 * np.pi * (y + bend * x * x) + phase)
    heart = np.exp(-np.square((x - 0.12) / each(0.18, 0.26))) * np.exp(-np.square((y - 0.35) / 0.3))
    spine = np.exp(-np.square(x / 0.1))
    image = 0.72 * body - 0.5 * lungs + 0.22 * heart + 0.12 * spine + domain.ribs * ribs * (0.4 + 0.6 * lungs)
    sick = (labels == 1)[:, None, None]
    for nth in range(3):
        present = each(0, 1) < (1.0, 0.6, 0.3)[nth]
        strength = np.where(sick, present * each(0.12, 0.42), each(0.0, 0.08)).astype(np.float32)
        lung_side = np.where(each(0, 1) < 0.5, 1, -1).astype(np.float32)
        spread = each(0.14, 0.30)
        across = np.square((x - lung_side * (gap + each(-0.15, 0.15))) / spread)
        along = np.square((y - each(-0.45, 0.45)) / spread)
        image += strength * np.exp(-across) * np.exp(-along) * (0.3 + 0.7 * lungs)
    return image.astype(np.float32)


def _exposed(anatomy: Floats, domain: Domain, rng: np.random.Generator) -> Floats:
    """Grey levels 0 to 255, with each image's own exposure."""
    n = len(anatomy)
    gain = (domain.contrast * rng.uniform(0.88, 1.12, (n, 1, 1))).astype(np.float32)
    offset = (domain.brightness + rng.uniform(-0.06, 0.06, (n, 1, 1))).astype(np.float32)
    levels: Floats = np.clip(gain * (anatomy - 0.5) + 0.5 + offset, 0, 1)
    if domain.gamma != 1:
        levels **= np.float32(domain.gamma)
    levels *= 255
    return levels


def _ellipse(x: Floats, y: Floats, edge: float) -> Floats:
    """1 inside the unit circle, 0 outside, over a soft edge."""
    return 1 / (1 + np.exp(np.clip(edge * (x * x + y * y - 1) * 2, -30, 30)))


def _enlarged(images: Floats, side: int) -> Floats:
    """(N, detail, detail) to (N, side, side), linear between pixel centres."""
    n, detail = images.shape[:2]
    if detail == side:
        return images
    centre = (np.arange(side) + 0.5) * detail / side - 0.5
    distance = np.abs(np.clip(centre, 0, detail - 1) - np.arange(detail)[:, None])
    weights = np.clip(1 - distance, 0, 1).astype(np.float32)  # (detail, side)
    # Both axes as one large product each: numpy runs a stack of small ones many times slower.
    high = (images.swapaxes(1, 2).reshape(-1, detail) @ weights).reshape(n, detail, side)
    return (high.swapaxes(1, 2).reshape(-1, detail) @ weights).reshape(n, side, side)
