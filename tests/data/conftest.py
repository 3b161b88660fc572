"""No user folder and no network: caches go to a temporary folder, downloads to a server on 127.0.0.1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_server import FaultyServer
from published import Target, small, use
from xray_files import png

from medtune.data import busi, cpn, medmnist_npz
from medtune.data.pairs import breastmnist_busi, pneumoniamnist_cpn


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDTUNE_DATA", raising=False)
    monkeypatch.delenv("MEDTUNE_EXTERNAL_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    yield server
    server.close()


@pytest.fixture
def small_medmnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """For speed, MedMNIST sets whose classes are not counted have 4, 2 and 2 images of each during the test."""
    real = medmnist_npz.source

    def source(name: str, native_size: int) -> medmnist_npz.Source:
        found = real(name, native_size)
        if name in medmnist_npz.CLASS_COUNTS:
            return found
        counts = {"train": 4 * len(found.classes), "val": 2 * len(found.classes), "test": 2 * len(found.classes)}
        return dataclasses.replace(found, counts=counts)

    monkeypatch.setattr(medmnist_npz, "source", source)


@pytest.fixture
def write_npz() -> Callable[..., Path]:
    """Writes a MedMNIST file of official shapes and counts with random images; arrays can be replaced."""

    def write(
        folder: Path, native_size: int = 28, drop: tuple[str, ...] = (), name: str = "pneumoniamnist", **arrays: Any
    ) -> Path:
        rng = np.random.default_rng(0)
        source = medmnist_npz.source(name, native_size)
        content: dict[str, Any] = {}
        for split, total in source.counts.items():
            counts = medmnist_npz.CLASS_COUNTS.get(name, {}).get(split)
            if counts and name == "breastmnist":
                counts = counts[::-1]  # as published: malignant is 0
            labels = np.arange(total, dtype=np.uint8) % len(source.classes)
            labels = rng.permutation(np.repeat(np.arange(2, dtype=np.uint8), counts) if counts else labels)
            shape = (total, native_size, native_size, *[source.channels] * (source.channels > 1))
            content[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
            content[f"{split}_labels"] = labels[:, None]
        content |= arrays
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / source.file
        np.savez(path, **{key: array for key, array in content.items() if key not in drop})
        return path

    return write


@pytest.fixture
def write_folders() -> Callable[..., Path]:
    """Writes `folder`/NAME/NAME_1.png, ... for NAME=count."""

    def write(folder: Path, counts: dict[str, int], **kwargs: Any) -> Path:
        seed = 0
        for name, count in counts.items():
            (folder / name).mkdir(parents=True)
            for number in range(1, count + 1):
                (folder / name / f"{name}_{number}.png").write_bytes(png(seed := seed + 1, **kwargs))
        return folder

    return write


@pytest.fixture
def write_xrays(write_folders: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a folder in CPN X-ray's layout."""

    def write(folder: Path, normal: int = 3, pneumonia: int = 4, covid: int = 1, **kwargs: Any) -> Path:
        return write_folders(folder, {"COVID": covid, "NORMAL": normal, "PNEUMONIA": pneumonia}, **kwargs)

    return write


@pytest.fixture
def small_cpn(monkeypatch: pytest.MonkeyPatch) -> Target:
    """For speed, CPN X-ray has 2 COVID, 3 NORMAL and 4 PNEUMONIA images during the test."""
    return use(monkeypatch, pneumoniamnist_cpn, small(cpn.SET, {"COVID": 2, "NORMAL": 3, "PNEUMONIA": 4}))


@pytest.fixture
def small_busi(monkeypatch: pytest.MonkeyPatch) -> Target:
    """For speed, Breast Ultrasound Images has 3 benign, 2 malignant and 2 normal images during the test."""
    counts = {"benign": 3, "malignant": 2, "normal": 2}
    return use(monkeypatch, breastmnist_busi, small(busi.SET, counts, "Dataset_BUSI_with_GT/"))


@pytest.fixture(params=["cpn", "busi"])
def target(request: pytest.FixtureRequest) -> Target:
    """Each published external set in turn."""
    found: Target = request.getfixturevalue(f"small_{request.param}")
    return found
