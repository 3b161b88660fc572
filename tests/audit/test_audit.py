"""The audit on images with planted copies, and on real ones where they are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image

from medtune import cli
from medtune.audit.looks import WHOLE, hashes, vectors
from medtune.audit.partners import partners
from medtune.audit.search import audit
from medtune.audit.sheet import write_sheet
from medtune.audit.verdict import at_start, kept_audit, of_limited, verdict_of
from medtune.data import PairData, Split, limit, load_pair
from medtune.data.pair import digest
from medtune.errors import ConfigError
from medtune.predictions import Predicted
from tests.support.made_study import MadeStudy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def scenes(count: int, side: int, seed: int, channels: int = 1) -> Split:
    """Smooth images that have nothing to do with each other, classes 0 and 1 in turn."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, channels, 9, 9)))
    smooth = torch.nn.functional.interpolate(noise, size=(side, side), mode="bicubic", align_corners=True)
    return Split((128 + 45 * smooth).clamp(0, 255).round().byte().numpy(), np.arange(count) % 2)


def resized(images: np.ndarray, side: int) -> np.ndarray:
    pictures = [Image.fromarray(image.transpose(1, 2, 0).squeeze()).resize((side, side)) for image in images]
    return np.stack([np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1) for picture in pictures])


def made(channels: int = 1) -> PairData:
    """40 training images, 20 of val, test and the external set, which is stored larger."""
    splits = {
        "train": scenes(40, 28, 0, channels),
        "val": scenes(20, 28, 1, channels),
        "test": scenes(20, 28, 2, channels),
        "external": scenes(20, 64, 3, channels),
    }
    prints = {name: digest(split) for name, split in splits.items()}
    return PairData(
        name="made", classes=("healthy", "ill"), positive=1, native_size=28, external_name="elsewhere",
        fingerprint=prints, **splits,
    )  # fmt: skip


def planted(data: PairData, split: str, images: np.ndarray, labels: np.ndarray | None = None) -> PairData:
    """The first images of a split are these."""
    old: Split = getattr(data, split)
    new = Split(old.images.copy(), old.labels.copy())
    new.images[: len(images)] = images
    if labels is not None:
        new.labels[: len(images)] = labels
    return replace(data, **{split: new}, fingerprint={**data.fingerprint, split: digest(new)})


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_have_nothing_to_do_with_each_other_are_no_leak(channels: int) -> None:
    found = audit(made(channels))
    assert all(one["near"] == one["exact"] == one["perceptual"] == 0 for one in found["leaked"].values())
    assert found["external_leaked"] == [] and found["worst"] == []
    assert found["words"].startswith("no leak found: 0 of 20 external images")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("change", ["rescaled", "brighter", "shifted", "cut"])
def test_planted_copies_are_found_whatever_was_done_to_them(channels: int, change: str) -> None:
    source = scenes(6, 128, 7, channels)
    copies = resized(source.images, 64)
    if change == "brighter":
        copies = (copies * 0.6 + 70).astype(np.uint8)
    if change == "shifted":
        copies = np.roll(copies, 1, axis=3)
    small = source.images[..., 16:-16] if change == "cut" else source.images  # as MedMNIST: the middle of a wide image
    whole = planted(made(channels), "train", resized(small, 28))
    found = audit(planted(whole, "external", copies))
    assert found["external_leaked"] == found["external_seen"] == list(range(6))
    assert found["leaked"]["external in train"]["correlated"] == 6
    assert found["baseline"]["correlated"] == 0
    assert {(one["index"], one["partner"]) for one in found["worst"]} == {(n, n) for n in range(6)}
    assert found["words"].startswith("LEAKED: 30 % of the external images have a near-duplicate in the training set (30 %")


def test_exact_copies_are_counted_in_each_pair_of_splits_and_an_image_is_no_copy_of_itself() -> None:
    data = made()
    data = planted(data, "val", data.train.images[:3])
    data = planted(data, "test", np.repeat(data.test.images[-1:], 2, axis=0))
    found = audit(data)["leaked"]
    assert {name: one["exact"] for name, one in found.items() if one["exact"]} == {"val in train": 3, "test in test": 3}


def test_copies_with_another_label_are_told_first() -> None:
    data = made()
    found = audit(planted(data, "val", data.train.images[:4], 1 - data.train.labels[:4]))
    assert found["leaked"]["val in train"]["other_label"] == 4
    assert found["words"].endswith("4 of 20 val images are copies of training images; 4 near-duplicates have another label")
    assert found["worst"][0]["labels"] == ["ill", "healthy"] or found["worst"][0]["labels"] == ["healthy", "ill"]


def test_images_that_are_all_alike_are_not_called_copies() -> None:
    """Correlation finds a partner for each: what is usual says so, and exact copies alone count."""
    data, one = made(), scenes(1, 28, 9).images[0].astype(int)
    rng = np.random.default_rng(0)
    for name in ("train", "val", "test", "external"):
        split = getattr(data, name)
        base = one if name != "external" else resized(one[None].astype(np.uint8), 64)[0].astype(int)
        alike = (base + rng.integers(-4, 5, split.images.shape)).clip(0, 255).astype(np.uint8)
        data = planted(data, name, alike)
    found = audit(data)
    assert found["usual"] and found["external_leaked"] == []
    assert "exact copies alone are counted, as 100 % of the test images correlate" in found["words"]


def test_the_own_test_split_is_no_external_set() -> None:
    data = made()
    data = replace(data, external=data.test, fingerprint={**data.fingerprint, "external": data.fingerprint["test"]})
    found = audit(data)
    assert found["words"].startswith("NO EXTERNAL SET") and "external in test" not in found["leaked"]


def test_hashes_are_imagehashs() -> None:
    images = scenes(30, 32, 4).images
    wanted = [imagehash.phash(Image.fromarray(image[0])).hash.ravel() for image in images]
    assert ((hashes(images, WHOLE[0]) > 0) == wanted).all()


def test_correlations_are_numpys() -> None:
    a, b = scenes(4, 28, 5), scenes(7, 28, 6)
    wanted = np.corrcoef(a.images.reshape(4, -1), b.images.reshape(7, -1))[:4, 4:]
    assert vectors(a.images, WHOLE[0], False) @ vectors(b.images, WHOLE[0], False).T == pytest.approx(wanted, abs=1e-5)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = planted(made(), "val", made().train.images[5:8])
    before = partners(data.val, data.train, WHOLE)
    monkeypatch.setattr("medtune.audit.partners._BLOCK", 150)
    after = partners(data.val, data.train, WHOLE)
    assert (before.likest == after.likest).all() and (before.distance == after.distance).all()
    assert before.correlation == pytest.approx(after.correlation, abs=1e-6)


def leaky() -> PairData:
    data = made()
    return planted(data, "external", resized(data.train.images[:5], 64))


def test_positions_are_those_of_the_limited_set_that_predictions_are_of() -> None:
    data = leaky()
    part = limit(data, train_limit=None, external_limit=9)
    verdict = of_limited(audit(data), data, 9)
    leaked = {image.tobytes() for image in data.external.images[:5]}
    wanted = [place for place, image in enumerate(part.external.images) if image.tobytes() in leaked]
    assert verdict["external_leaked"] == wanted and 0 < len(wanted) < 5
    assert verdict["external_tested"] == 9


def test_an_audit_is_kept_and_left_in_a_studys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    study = MadeStudy(tmp_path / "study")
    assert verdict_of(study.read()) is None
    at_start(study.folder, leaky(), None, said.append)
    found = verdict_of(study.read())
    assert found is not None and found["external_leaked"] == list(range(5)) and len(said) == 1
    monkeypatch.setattr("medtune.audit.search.audit", None)  # it is not made twice
    assert kept_audit(leaky(), 0.95, said.append)["words"] == found["words"]
    at_start(study.folder, leaky(), None, said.append)
    assert len(said) == 1


def test_a_large_pair_is_left_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medtune.audit.verdict.QUICK", 10)
    at_start(tmp_path, leaky(), None, print)
    assert not (tmp_path / "audit.json").exists()


def test_best_says_the_verdict_and_drops_what_is_leaked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medtune import predictions

    study = MadeStudy(tmp_path / "study")
    number = study.trial(0.5, external={"external/auc": 0.9})
    assert cli.main(["best", str(study.folder)]) == 0
    assert "not audited for near-duplicates: medtune data audit --study study" in capsys.readouterr().out
    assert cli.main(["best", str(study.folder), "--drop-leaked"]) == 2
    assert "run `medtune data audit --study study` first" in capsys.readouterr().err
    at_start(study.folder, leaky(), None, lambda text: None)
    labels = leaky().external.labels
    logits = np.eye(2, dtype=np.float32)[labels]
    logits[5:7] = logits[5:7, ::-1]  # right on the five that are leaked, wrong on two of the fifteen others
    folder = study.folder / "trials" / f"{number:04d}" / "attempt-1"
    predictions.write(folder, {"external": Predicted(logits, labels)})
    assert cli.main(["best", str(study.folder), "--drop-leaked"]) == 0
    said = capsys.readouterr().out
    assert "external set: LEAKED: 25 %" in said
    assert "without the 5 images that have near-duplicates in train or val" in said and "15 images" in said
    assert "oa 0.867" in said


def test_the_sheet_shows_the_worst_pairs(tmp_path: Path) -> None:
    path = write_sheet(audit(leaky()), leaky(), tmp_path / "new")
    assert path is not None
    with Image.open(path) as image:
        assert image.width > 1000 and np.asarray(image).std() > 20
    assert write_sheet(audit(made()), made(), tmp_path) is None


def test_a_threshold_that_is_none_is_refused() -> None:
    from medtune.audit.command import data_audit

    with pytest.raises(ConfigError, match="threshold must be between 0 and 1, got 95"):
        data_audit(pair="synthetic", threshold=95)


def real() -> bool:
    sample = Path(os.environ.get("MEDTUNE_EXTERNAL_DIR", "-"))
    return "MEDTUNE_DATA" in os.environ and sample.name == "cpn_sample" and sample.is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not real(), reason="needs $MEDTUNE_DATA, and $MEDTUNE_EXTERNAL_DIR that names cpn_sample")
def test_the_sample_that_is_near_identical_to_pneumoniamnist_is_found() -> None:
    found = audit(load_pair("pneumoniamnist-cpn"))
    assert found["leaked"]["val in train"]["exact"] == 8
    assert 0.95 < len(found["external_leaked"]) / found["images"]["external"] < 1
    assert found["baseline"]["near"] < 0.01
    assert found["words"].startswith("LEAKED: 97 %")
