"""Prediction from a bundle: the trial's own figures, decisions at the threshold, a line for each file."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from medtune.cli import main
from medtune.data import load_pair
from medtune.deploy.bundle import Bundle
from medtune.deploy.predict import predictions
from medtune.deploy.predictor import Predictor
from medtune.errors import ImageError
from medtune.evidence.calibration import calibrated
from medtune.results import Study, predicted


@pytest.fixture(scope="module")
def predictor(exported: Path) -> Predictor:
    return Predictor.load(exported, "cpu")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.asarray(load_pair("synthetic").val.images)


def test_predictions_are_the_trials_own(predictor: Predictor, trained: Study, images: np.ndarray) -> None:
    found = predictor.predict(list(images))
    own = predicted(trained, trained.rows[0])
    assert own is not None
    wanted = calibrated(own["val"].logits, predictor.bundle.temperature)
    np.testing.assert_allclose([p.score for p in found], wanted[:, 1], atol=1e-5)
    for one, probs in zip(found, wanted, strict=True):
        assert one.probabilities == pytest.approx({"normal": probs[0], "pneumonia": probs[1]}, abs=1e-5)
        assert one.decision == ("pneumonia" if one.score >= one.threshold else "normal")
    flagged = np.mean([p.unlike_training for p in found])
    assert 0 < flagged < 0.02


def test_an_image_alone_is_predicted_as_among_others(predictor: Predictor, images: np.ndarray) -> None:
    together = predictor.predict(list(images[:5]))
    for image, one in zip(images[:5], together, strict=True):
        alone = predictor.predict([image])[0]
        assert alone.score == pytest.approx(one.score, abs=1e-5) and alone.distance == pytest.approx(one.distance, abs=1e-4)
    assert predictor.predict([]) == []


def test_what_is_no_xray_is_flagged(predictor: Predictor, images: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 1, 64, 64), dtype=np.uint8)
    strange = [*noise, np.zeros((1, 50, 50), np.uint8), np.full((3, 50, 70), 255, np.uint8)]
    assert all(one.unlike_training for one in predictor.predict(strange))


def test_photographs_and_inverted_images_are_flagged(predictor: Predictor, images: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(photo).convert("L") for photo in load_sample_images().images]
    crops = []
    for photograph in photographs * 10:
        left, top = (int(rng.integers(side - 200)) for side in photograph.size)
        crops.append(photograph.crop((left, top, left + 200, top + 200)))
    for strange in ([np.asarray(crop)[None] for crop in crops], list(255 - images)):
        assert np.mean([one.unlike_training for one in predictor.predict(strange)]) > 0.9


def test_what_is_no_image_is_refused(predictor: Predictor) -> None:
    with pytest.raises(ImageError):
        predictor.predict([np.zeros((28, 28))])


@pytest.fixture
def files(tmp_path: Path, images: np.ndarray) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(images[i, 0]).save(folder / f"{i}.png")
    Image.fromarray(images[0].repeat(3, 0).transpose(1, 2, 0)).save(folder / "colour.png")
    (folder / "broken.png").write_bytes(b"none")
    return folder


def test_each_file_has_its_line_and_the_broken_one_its_reason(
    exported: Path, files: Path, tmp_path: Path, predictor: Predictor, images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "out.csv"
    assert main(["predict", str(exported), str(files), "-o", str(table), "--gradcam", str(tmp_path / "heat")]) == 1
    assert "broken.png: no image" in capsys.readouterr().err
    lines = {Path(line["path"]).name: line for line in csv.DictReader(table.open())}
    assert list(lines) == ["0.png", "1.png", "2.png", "broken.png", "colour.png"]
    assert "no image" in lines["broken.png"]["error"] and lines["broken.png"]["decision"] == ""
    for i, one in enumerate(predictor.predict(list(images[:3]))):
        assert float(lines[f"{i}.png"]["probability pneumonia"]) == pytest.approx(one.score, abs=1e-5)
        assert lines[f"{i}.png"]["decision"] == one.decision and lines[f"{i}.png"]["error"] == ""
    assert lines["colour.png"]["probability pneumonia"] == lines["0.png"]["probability pneumonia"]
    assert sorted(p.name for p in (tmp_path / "heat").iterdir()) == [
        "00000-0.png", "00001-1.png", "00002-2.png", "00004-colour.png"
    ]  # fmt: skip


def test_json_and_a_list_from_stdin(
    exported: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{files / '0.png'}\n"))
    assert main(["predict", str(exported), "-", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["error"] is None and found["path"] == str(files / "0.png")
    assert set(found["probabilities"]) == {"normal", "pneumonia"}


def test_names_are_kept_whatever_is_in_them(
    exported: Path, files: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    raw = (b"a b.png", '\u00fc\u2028, "1".png'.encode(), b"not utf-8 \xff.png", b"a\rb\nc.png")
    names = [os.fsdecode(name) for name in raw]
    folder = tmp_path / "named"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((files / "0.png").read_bytes())
    (folder / os.fsdecode(b"\xff broken.png")).touch()
    table = tmp_path / "out.csv"
    assert main(["predict", str(exported), str(folder), "-o", str(table)]) == 1
    capsysbinary.readouterr()
    assert main(["predict", str(exported), str(folder)]) == 1
    assert capsysbinary.readouterr().out == table.read_bytes()
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = list(csv.DictReader(file))
    assert {Path(line["path"]).name for line in lines if not line["error"]} == set(names)
    assert len({line["probability pneumonia"] for line in lines if not line["error"]}) == 1 and len(lines) == 5


def test_a_disk_that_is_full_is_named(exported: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(exported), str(files), "-o", "/dev/full"]) == 2
    assert "cannot write /dev/full: No space" in capsys.readouterr().err
    assert main(["predict", str(exported), str(files / "0.png"), "--gradcam", "/dev/null/heat"]) == 2
    assert "cannot write /dev/null/heat" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:99"])
def test_a_device_that_is_none_is_named(
    exported: Path, files: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(exported), str(files), "--device", device]) == 2
    assert f"--device {device}: " in capsys.readouterr().err


def test_many_large_images_are_not_held_at_once(predictor: Predictor, tmp_path: Path) -> None:
    Image.new("L", (600, 500), 90).save(tmp_path / "large.png")
    read = Mock(side_effect=predictor.predict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "predict", read)
        list(predictions(predictor, [tmp_path / "large.png"]))
    (taken,) = read.call_args.args[0]
    assert taken.shape == (1, 256, 256)


def test_nothing_to_predict_is_an_error(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(exported), str(tmp_path)]) == 2
    assert "no image in" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), "x.png"]) == 2
    assert "no bundle" in capsys.readouterr().err


def test_more_than_two_classes_have_no_threshold(exported: Path, predictor: Predictor) -> None:
    manifest = {**predictor.bundle.manifest, "classes": ["a", "b", "c"], "decision": {"threshold": None, "temperature": 1.0}}
    three = Predictor(Bundle(exported, manifest, {}), predictor.model, predictor.reference, predictor.device)
    found = three._prediction(np.array([0.2, 0.5, 0.3]), 0.0)
    assert (found.decision, found.score, found.threshold) == ("b", 0.5, None)
