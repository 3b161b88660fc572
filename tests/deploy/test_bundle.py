"""The bundle: every byte is accounted for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from medtune.deploy.bundle import MANIFEST, Bundle, seal
from medtune.errors import BundleError

FILES = ("MODEL_CARD.md", "likeness.safetensors", "model.pt2", "model.safetensors")


def test_a_bundle_says_what_it_is(bundle: Path) -> None:
    found = Bundle.open(bundle)
    assert (found.model, found.classes, found.positive, found.image_size) == ("tiny", ("normal", "pneumonia"), 1, 32)
    assert sorted(found.manifest["files"]) == sorted(FILES)
    assert found.threshold is not None and 0 <= found.threshold <= 1 and found.temperature > 0


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_a_changed_byte_is_refused_by_name(bundle: Path, name: str, at: float) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[round(at * (len(data) - 1))] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle)


@pytest.mark.parametrize("change", ["missing", "longer", "extra", "nested", "linked"])
def test_missing_longer_and_further_files_are_refused_by_name(bundle: Path, change: str) -> None:
    name = {"extra": "notes.txt", "nested": "more/notes.txt", "linked": "link"}.get(change, "model.safetensors")
    if change == "missing":
        (bundle / name).unlink()
    elif change == "linked":
        (bundle / name).symlink_to(bundle.parent)
    else:
        (bundle / name).parent.mkdir(exist_ok=True)
        with (bundle / name).open("ab") as file:
            file.write(b"\0")
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle)


@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_in_place_of_a_file_is_not_waited_for(bundle: Path) -> None:
    program = bundle / "model.pt2"
    program.unlink()
    os.mkfifo(program)
    with pytest.raises(BundleError, match=r"model\.pt2"):
        Bundle.open(bundle)
    program.unlink()
    program.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=r"model\.pt2"):
        Bundle.open(bundle)


def test_a_bundle_sealed_without_its_weights_is_refused(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    (bundle / MANIFEST).unlink()
    (bundle / "model.safetensors").unlink()
    seal(bundle, {key: value for key, value in manifest.items() if key not in ("files", "sha256", "format")})
    with pytest.raises(BundleError, match=r"model\.safetensors is missing"):
        Bundle.open(bundle)


def test_a_file_that_cannot_be_read_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("medtune.deploy.bundle.digest_of", denied)
    with pytest.raises(BundleError, match=r"cannot read .*: Permission denied"):
        Bundle.open(bundle)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{", '{"sha256": 1, "files": {}}', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.open(bundle)


def test_a_manifest_written_otherwise_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.open(bundle)


def test_what_is_no_bundle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match="medtune export"):
            Bundle.open(folder)


def test_other_content_is_another_version(bundle: Path) -> None:
    before = Bundle.open(bundle)
    (bundle / "MODEL_CARD.md").write_text("another")
    (bundle / MANIFEST).unlink()
    seal(bundle, {key: value for key, value in before.manifest.items() if key not in ("files", "sha256", "format")})
    assert Bundle.open(bundle).version != before.version
