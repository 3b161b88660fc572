"""The bundle: a folder whose every byte is accounted for by its manifest, which accounts for itself.

The manifest has the SHA-256 and size of each file, and, last, that of its own other entries. This finds damage and
careless edits; it is no signature: who can write the folder can seal it anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtune.errors import BundleError
from medtune.record import plain

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
LIKENESS = "likeness.safetensors"
PROGRAM = "model.pt2"
ONNX = "model.onnx"
CARD = "MODEL_CARD.md"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; `manifest` says all there is to know of it."""

    folder: Path
    manifest: Mapping[str, Any]
    content: Mapping[str, bytes]
    """What is computed with, as it was verified: a file that is changed later changes nothing."""

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read a bundle. Raises BundleError that names the file that is missing, changed or not of the bundle."""
        folder = Path(folder)
        manifest = _read_manifest(folder)
        try:
            return cls(folder, manifest, _verified(folder, manifest["files"]))
        except OSError as error:
            raise BundleError(f"cannot read {error.filename}: {error.strerror}") from None

    @property
    def version(self) -> str:
        """The bundle's own mark: other content, another version."""
        return str(self.manifest["sha256"])[:12]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        return tuple(self.manifest["classes"])

    @property
    def positive(self) -> int | None:
        """Label of the positive class; None for more than two classes."""
        return 1 if len(self.classes) == 2 else None

    @property
    def model(self) -> str:
        """The architecture's name, as `medtune models` lists it."""
        return str(self.manifest["model"])

    @property
    def image_size(self) -> int:
        """Side in px of the images that the model takes."""
        return int(self.manifest["preprocessing"]["image_size"])

    @property
    def threshold(self) -> float | None:
        """Calibrated probability of the positive class from which on it is decided; None for more than two classes."""
        return self.manifest["decision"]["threshold"]

    @property
    def temperature(self) -> float:
        """What logits are divided by before softmax."""
        return float(self.manifest["decision"]["temperature"])


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of all that lies in `folder`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest_of(folder / name)} for name in names}
    body = {"format": FORMAT, **plain(about), "files": files}
    (folder / MANIFEST).write_text(_text({**body, "sha256": _own_digest(body)}), encoding="utf-8")


def digest_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}. `medtune export STUDY -o DIR` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path}: {error}") from None
    try:
        manifest = json.loads(text)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        # Byte by byte: what JSON takes for the same, a space more, is another manifest as well.
        same = manifest["sha256"] == _own_digest(body) and text == _text({**body, "sha256": manifest["sha256"]})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        same = False
    if not same:
        raise _changed(folder, f"{MANIFEST} is not what was written")
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path} is of format {manifest.get('format')}; this medtune reads format {FORMAT}")
    return manifest


def _verified(folder: Path, listed: Mapping[str, Any]) -> dict[str, bytes]:
    """The content of what is computed with, once every file was looked at."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _plain_folder(path)}
    for name in sorted({*found, *listed, WEIGHTS, LIKENESS} - {MANIFEST}):
        if name not in found:
            raise _changed(folder, f"{name} is missing")
        if name not in listed:
            raise _changed(folder, f"{name} is not of it")
        # Nothing but a file: of a pipe or a device in its place the end would be waited for.
        if not (folder / name).is_file() or digest_of(folder / name) != listed[name]["sha256"]:
            raise _changed(folder, f"{name} is not what was written")
    return {name: _read_same(folder, name, listed[name]["sha256"]) for name in (WEIGHTS, LIKENESS)}


def _own_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(body).encode()).hexdigest()


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _read_same(folder: Path, name: str, digest: str) -> bytes:
    data = (folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise _changed(folder, f"{name} is not what was written")
    return data


def _plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _changed(folder: Path, what: str) -> BundleError:
    return BundleError(f"the bundle {folder} was changed since it was written: {what}. Get it anew from where it was made")
