"""No user folder and no network: caches go to a temporary folder, downloads to a server on 127.0.0.1."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_server import FaultyServer
from xray_files import png

from medtune.data import cpn, medmnist_npz


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
def write_npz() -> Callable[..., Path]:
    """Writes a PneumoniaMNIST file with official shapes and counts and random images; arrays can be replaced."""

    def write(folder: Path, native_size: int = 28, drop: tuple[str, ...] = (), **arrays: Any) -> Path:
        rng = np.random.default_rng(0)
        content: dict[str, Any] = {}
        for name, counts in medmnist_npz.COUNTS.items():
            labels = rng.permutation(np.repeat(np.arange(2, dtype=np.uint8), counts))
            content[f"{name}_images"] = rng.integers(0, 256, (len(labels), native_size, native_size), dtype=np.uint8)
            content[f"{name}_labels"] = labels[:, None]
        content |= arrays
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / medmnist_npz.source(native_size).file
        np.savez(path, **{name: array for name, array in content.items() if name not in drop})
        return path

    return write


@pytest.fixture
def write_xrays() -> Callable[..., Path]:
    """Writes a folder in CPN X-ray's layout."""

    def write(folder: Path, normal: int = 3, pneumonia: int = 4, covid: int = 1, **kwargs: Any) -> Path:
        seed = 0
        for name, count in (("COVID", covid), ("NORMAL", normal), ("PNEUMONIA", pneumonia)):
            (folder / name).mkdir(parents=True)
            for number in range(1, count + 1):
                (folder / name / f"{name}_{number}.png").write_bytes(png(seed := seed + 1, **kwargs))
        return folder

    return write


@pytest.fixture
def small_cpn(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """For speed, CPN X-ray has 2 COVID, 3 NORMAL and 4 PNEUMONIA images during the test."""
    counts = {"COVID": 2, "NORMAL": 3, "PNEUMONIA": 4}
    monkeypatch.setattr(cpn, "COUNTS", counts)
    return counts


@pytest.fixture
def make_archive() -> Callable[..., bytes]:
    """The bytes of an archive like the published one: a zip in a zip. `extra` members are added to the inner one."""

    def make(counts: dict[str, int], extra: dict[str, bytes] | None = None, outer: bool = True, **kwargs: Any) -> bytes:
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as images:
            seed = 0
            for name, count in counts.items():
                for number in range(1, count + 1):
                    images.writestr(f"{name}/{name}_{number}.png", png(seed := seed + 1, **kwargs))
            for name, content in (extra or {}).items():
                images.writestr(name, content)
        if not outer:
            return inner.getvalue()
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"dvntn9yhd2-1/{cpn.INNER}", inner.getvalue())
        return whole.getvalue()

    return make
