"""The published external sets, small, as tests make them."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xray_files import png

from medtune.data.archive import Published


@dataclass(frozen=True)
class Target:
    """A pair's external set and how its archive is built."""

    published: Published
    top: str
    """Folder in the zip that holds the class folders."""

    @property
    def pair(self) -> str:
        return self.published.pair

    @property
    def file(self) -> str:
        return self.published.files[0]

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.published.counts)

    def fewer(self, name: str) -> dict[str, int]:
        return {**self.counts, name: self.counts[name] - 1}

    def archive(
        self, counts: dict[str, int] | None = None, extra: dict[str, bytes] | None = None, outer: bool = True, **kwargs: Any
    ) -> bytes:
        """The bytes of an archive like the published one. `extra` members are added to the zip with the images."""
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as images:
            seed = 0
            for name, count in (counts or self.counts).items():
                for number in range(1, count + 1):
                    images.writestr(f"{self.top}{name}/{name}_{number}.png", png(seed := seed + 1, **kwargs))
            for name, content in (extra or {}).items():
                images.writestr(f"{self.top}{name}" if not name.startswith(("/", "..")) else name, content)
        if not outer or self.published.inner is None:
            return inner.getvalue()
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"dvntn9yhd2-1/{self.published.inner}", inner.getvalue())
        return whole.getvalue()

    def images_of(self, content: bytes) -> bytes:
        """The zip with the images in an archive's bytes."""
        with zipfile.ZipFile(io.BytesIO(content)) as outer:
            inside = [name for name in outer.namelist() if name.endswith(".zip")]
            return outer.read(inside[0]) if inside else content

    def unzip(self, content: bytes, folder: Path) -> Path:
        """As a user would: the outer zip, then the inner one; the folder with the class folders."""
        zipfile.ZipFile(io.BytesIO(self.images_of(content))).extractall(folder)
        return folder / self.top


def small(published: Published, counts: dict[str, int], top: str = "") -> Target:
    """The set with so few images."""
    return Target(dataclasses.replace(published, counts=counts), top)


def use(monkeypatch: pytest.MonkeyPatch, module: Any, target: Target) -> Target:
    """The pair of `module` is tested on this set during the test."""
    pair = dataclasses.replace(module.PAIR, published=target.published)
    for name in ("load", "get", "check", "where"):
        monkeypatch.setattr(module, name, getattr(pair, name))
    return target
