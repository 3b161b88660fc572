"""Generated chest-like images in two domains, for tests and first runs: no figure from them says anything of patients.

Bright body, two dark lungs with ribs, heart and spine; pneumonia is one to three soft opacities in the lungs, some
hardly stronger than what healthy lungs show. The external domain has its own exposure, contrast, geometry, sharper
ribs, stronger noise and a side marker, at 256x256, as CPN X-ray differs from PneumoniaMNIST.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtune.data.pair import PairData, Split, digest

NAME = "synthetic"
SIZES = {"train": (264, 760), "val": (66, 190), "test": (96, 160), "external": (200, 200)}
"""Normal and pneumonia images per split; train, val and test in PneumoniaMNIST's proportions."""
EXTERNAL_SIDE = 256
_CHUNK = 64
_DETAIL = 64  # anatomy is drawn at this many px at most (twice that outside) and enlarged: it is smooth

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Domain:
    """How a hospital's images look."""

    lung_height: float
    ribs: float
    contrast: float
    brightness: float
    gamma: float
    noise: float
    marker: bool


TRAINING = Domain(lung_height=0.62, ribs=0.05, contrast=1.0, brightness=0.0, gamma=1.0, noise=0.03, marker=False)
OUTSIDE = Domain(lung_height=0.70, ribs=0.09, contrast=1.2, brightness=-0.06, gamma=0.85, noise=0.05, marker=True)


def load(
    *, native_size: int, data_dir: Path | None, external_dir: Path | None, external_fallback: bool
) -> PairData:
    """The generated pair; needs no files and ignores where they would be."""
    return generate(seed=0, native_size=native_size)


@lru_cache(maxsize=2)
def generate(seed: int = 0, native_size: int = 28) -> PairData:
    """Training images (N, 1, native_size, native_size) and external ones (400, 1, 256, 256), by `seed` alone."""
    splits = {}
    for name, counts in SIZES.items():
        rng = np.random.default_rng([seed, *name.encode()])
        labels = rng.permutation(np.repeat(np.arange(2), counts))
        outside = name == "external"
        images = draw(labels, EXTERNAL_SIDE if outside else native_size, OUTSIDE if outside else TRAINING, rng)
        for array in (images, labels):
            array.flags.writeable = False
        splits[name] = Split(images, labels)
    return PairData(
        name=NAME,
        classes=("normal", "pneumonia"),
        positive=1,
        native_size=native_size,
        **splits,
        external_name="synthetic",
        synthetic=True,
        warnings=("synthetic images: generated, no figure from them says anything about patients",),
        fingerprint={name: digest(split) for name, split in splits.items()},
    )


def draw(labels: NDArray[np.int64], side: int, domain: Domain, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images uint8 (N, 1, side, side) for these labels."""
    detail = min(side, _DETAIL * (2 if domain is OUTSIDE else 1))
    enlarge = _enlargement(detail, side)
    out = np.empty((len(labels), 1, side, side), np.uint8)
    for start in range(0, len(labels), _CHUNK):
        part = labels[start : start + _CHUNK]
        anatomy = enlarge @ _anatomy(part, detail, domain, rng) @ enlarge.T
        out[start : start + _CHUNK, 0] = _exposed(anatomy, domain, rng)
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
    gap, width, height = each(0.40, 0.46), each(0.26, 0.32), domain.lung_height * each(0.92, 1.08)
    lungs = np.maximum(_ellipse((x - gap) / width, y / height, 4), _ellipse((x + gap) / width, y / height, 4))
    bend, phase = each(0.3, 0.5), each(0, 6.28)
    ribs = np.cos(6 * np.pi * (y + bend * x * x) + phase)
    heart = np.exp(-np.square((x - 0.12) / each(0.18, 0.26))) * np.exp(-np.square((y - 0.35) / 0.3))
    spine = np.exp(-np.square(x / 0.1))
    image = 0.72 * body - 0.5 * lungs + 0.22 * heart + 0.12 * spine + domain.ribs * ribs * (0.4 + 0.6 * lungs)
    sick = (labels == 1)[:, None, None]
    for nth in range(3):
        present = each(0, 1) < (1.0, 0.6, 0.3)[nth]
        strength = np.where(sick, present * each(0.06, 0.34), each(0.0, 0.09)).astype(np.float32)
        lung_side = np.where(each(0, 1) < 0.5, 1, -1).astype(np.float32)
        spread = each(0.10, 0.24)
        across = np.square((x - lung_side * (gap + each(-0.15, 0.15))) / spread)
        along = np.square((y - each(-0.45, 0.45)) / spread)
        image += strength * np.exp(-across) * np.exp(-along) * (0.3 + 0.7 * lungs)
    return image.astype(np.float32)


def _exposed(anatomy: Floats, domain: Domain, rng: np.random.Generator) -> NDArray[np.uint8]:
    n, side = anatomy.shape[:2]
    gain = (domain.contrast * rng.uniform(0.88, 1.12, (n, 1, 1))).astype(np.float32)
    offset = (domain.brightness + rng.uniform(-0.06, 0.06, (n, 1, 1))).astype(np.float32)
    image = np.clip(gain * (anatomy - 0.5) + 0.5 + offset, 0, 1)
    if domain.gamma != 1:
        image **= np.float32(domain.gamma)
    image += domain.noise * rng.standard_normal(image.shape, dtype=np.float32)
    if domain.marker:
        mark = side // 12
        image[:, mark : 2 * mark, mark : 2 * mark] = 0.95
    return (image.clip(0, 1) * 255).astype(np.uint8)


def _ellipse(x: Floats, y: Floats, edge: float) -> Floats:
    """1 inside the unit circle, 0 outside, over a soft edge."""
    return 1 / (1 + np.exp(np.clip(edge * (x * x + y * y - 1) * 2, -30, 30)))


def _enlargement(detail: int, side: int) -> Floats:
    """Weights (side, detail) of linear interpolation between pixel centres."""
    centre = (np.arange(side) + 0.5) * detail / side - 0.5
    weights = np.clip(1 - np.abs(np.clip(centre, 0, detail - 1)[:, None] - np.arange(detail)), 0, 1)
    return weights.astype(np.float32)
