"""Export: what is written is what was trained, or nothing is written."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medtune import predictions
from medtune.cli import main
from medtune.data import PairData, Split, limit, load_pair
from medtune.data.pairs import synthetic
from medtune.data.transforms import prepare
from medtune.deploy.bundle import Bundle
from medtune.deploy.export import export
from medtune.deploy.predictor import Predictor
from medtune.deploy.source import find
from medtune.errors import BundleError, ConfigError, DataError, StudyError
from medtune.evidence.calibration import calibrated
from medtune.predictions import Predicted
from medtune.results import Study, predicted
from tests.deploy.conftest import train
from tests.support.made_study import MadeStudy
from tests.support.models import SMALL

NO_PROGRAMS = {
    "program": {"file": "model.pt2", "largest_difference": 0.0, "compared_on": "nothing"},
    "onnx": {"file": None, "why": "no"},
}


def test_the_card_says_what_must_be_known(exported: Path) -> None:
    card, about = (exported / "MODEL_CARD.md").read_text(), Bundle.open(exported).manifest
    for words in ("SYNTHETIC", "Not a medical device", "not retrained", "Licence", "sensitivity=0.95"):
        assert words in card
    value = about["metrics"]["external"]["argmax"]["auc"]
    assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in card
    assert f"{100 * about['likeness']['flagged']['val']:.1f} % of val" in card
    assert about["onnx"]["why"] in card


def test_the_program_runs_without_our_model_and_at_any_batch(exported: Path, trained: Study) -> None:
    program = torch.export.load(exported / "model.pt2").module()
    own = predicted(trained, trained.rows[0])
    assert own is not None
    images = prepare(torch.tensor(np.asarray(load_pair("synthetic").val.images[:7])), 32)
    for count in (1, 7):
        np.testing.assert_allclose(program(images[:count]).detach(), own["val"].logits[:count], atol=1e-5)


def test_a_folder_with_something_in_it_is_left_alone(trained: Study, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(BundleError, match="not empty"):
        export(find(trained, None, None), tmp_path, None, None)
    assert os.listdir(tmp_path) == ["mine"]


def test_a_folder_that_is_there_stays_the_same_one(
    trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a mount or a link, which cannot be replaced, or the one the user is in."""
    folder = tmp_path / "real"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setattr("medtune.deploy.programs.write", lambda *_: NO_PROGRAMS)
    before, source = folder.stat().st_ino, find(trained, None, None)
    export(source, tmp_path / "link", None, None)
    assert folder.stat().st_ino == before and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(folder)) == ["MODEL_CARD.md", "likeness.safetensors", "manifest.json", "model.safetensors"]
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.chdir(folder)
    export(source, Path(), None, None)
    assert os.listdir() and Bundle.open(folder).model == "tiny"


def test_of_a_large_set_a_part_tells_what_is_unlike_it(
    trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medtune.deploy.programs.write", lambda *_: NO_PROGRAMS)
    monkeypatch.setattr("medtune.deploy.export.MOST_KNOWN", 100)
    about = export(find(trained, None, None), tmp_path / "bundle", None, None).manifest["likeness"]
    assert "of 100 training images" in about["measure"]
    assert about["flagged"]["val"] < 0.02


def test_weights_that_do_not_give_the_trials_predictions_are_refused(trained: Study, tmp_path: Path) -> None:
    source = find(trained, None, None)
    val = source.predictions["val"]
    other = {**source.predictions, "val": Predicted(val.logits + 1e-3, val.labels)}
    with pytest.raises(BundleError, match="tolerance"):
        export(replace(source, predictions=other), tmp_path / "bundle", None, None)
    assert not list(tmp_path.iterdir())


def test_other_data_are_refused(trained: Study, tmp_path: Path) -> None:
    record = {**trained.record, "data": {**trained.record["data"], "train": "0" * 64}}
    with pytest.raises(DataError, match="train images here are not those"):
        export(find(replace(trained, record=record), None, None), tmp_path / "bundle", None, None)
    assert not list(tmp_path.iterdir())


def test_the_threshold_follows_its_rule(trained: Study) -> None:
    own = predicted(trained, trained.rows[0])
    assert own is not None
    for rule, least in (("sensitivity=0.9", 0.9), ("sensitivity=1", 1.0)):
        decided = find(trained, 0, rule).decided
        probs = calibrated(own["val"].logits, decided["temperature"])[:, 1]
        assert (probs[own["val"].labels == 1] >= decided["threshold"]["value"]).mean() >= least
    with pytest.raises(ConfigError, match="threshold rule"):
        find(trained, 0, "about half")


def test_trials_that_cannot_be_exported_are_refused_with_the_reason(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "made")
    with pytest.raises(StudyError, match="trained to the end yet"):
        find(made.read(), None, None)
    made.trial(0.5, state="PRUNED", epochs=2)
    made.trial(0.5)
    study = made.read()
    with pytest.raises(StudyError, match="is PRUNED"):
        find(study, 0, None)
    with pytest.raises(StudyError, match="not kept"):
        find(study, 1, None)
    with pytest.raises(ConfigError, match="unknown trial"):
        find(study, 7, None)


def chosen(study: Study) -> dict[str, object]:
    """A choice as `medtune choose` keeps it, of the study's own trial standing for a training of the stage."""
    decided = find(study, 0, "youden").decided
    runs = [{"seed": 5, "number": 0, "value": 0.5, "figures": {}, "folder": ""}]
    return {
        "finalists": [{"trial": 0, "runs": runs}], "chosen": {"trial": 0, "run": 0, "why": "clearly ahead"},
        "ties": "tied with nothing", "cautions": ["chosen with external labels"], **decided,
    }  # fmt: skip


def test_what_was_chosen_is_exported_with_its_threshold(trained: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(trained)
    monkeypatch.setattr("medtune.deploy.source.read_choice", lambda study: choice)
    monkeypatch.setattr("medtune.deploy.source.open_stage", lambda study: trained)
    source = find(trained, None, None)
    assert source.why == "clearly ahead" and source.cautions == ("tied with nothing", "chosen with external labels")
    assert source.decided["threshold"] == choice["threshold"] and source.run == {"seed": 5, "number": 0, "of": 1}
    with pytest.raises(ConfigError, match="youden"):
        find(trained, None, "argmax")
    assert find(trained, None, " youden").decided["threshold"] == choice["threshold"]
    choice["threshold"] = None  # of more than two classes
    assert find(trained, None, "argmax").decided["threshold"] is None
    with pytest.raises(ConfigError, match="made with argmax"):
        find(trained, None, "youden")
    assert find(trained, 0, "argmax").run is None


def test_the_commands_say_what_they_did(trained: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained.folder), "0", "-o", str(tmp_path / "bundle"), "--threshold", "youden"]) == 0
    out = capsys.readouterr().out
    assert "named by hand" in out and "logits equal the trial's own" in out
    assert Bundle.open(tmp_path / "bundle").manifest["decision"]["rule"] == "youden"
    assert main(["gradcam", str(trained.folder), "-o", str(tmp_path / "sheets")]) == 0
    drawn = {path.name for path in (tmp_path / "sheets").iterdir()}
    assert {"val-hits.png", "external-hits.png"} <= drawn


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SMALL)
def test_every_architecture_is_exported_and_predicts_as_the_trial_did(name: str, tmp_path: Path) -> None:
    study = train(tmp_path / "study", name, epochs=1, train_limit=64)
    export(find(study, None, None), tmp_path / "bundle", None, None)
    predictor = Predictor.load(tmp_path / "bundle", "cpu")
    own = predicted(study, study.rows[0])
    assert own is not None
    data = limit(load_pair("synthetic"), train_limit=64, external_limit=64)
    for split in ("val", "external"):
        images = np.asarray(getattr(data, split).images)
        logits, _ = predictor.outputs(torch.stack([predictor.prepared(image) for image in images]))
        np.testing.assert_allclose(logits, own[split].logits, atol=1e-5)
    onnx = predictor.bundle.manifest["onnx"]
    assert bool(onnx["file"]) == (name in ("resnet50", "medvit_small"))
    assert onnx["file"] is None or onnx["largest_difference"] < 1e-4


@pytest.mark.slow
def test_three_classes_are_exported_predicted_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ("normal", "left, or right", "both")

    def three(**_: object) -> PairData:
        data = synthetic.generate()
        splits = {name: getattr(data, name) for name in ("train", "val", "test", "external")}
        turn = {name: 1 + np.arange(len(split.labels)) % 2 for name, split in splits.items()}
        thirds = {name: Split(split.images, split.labels * turn[name]) for name, split in splits.items()}
        return replace(data, classes=classes, **thirds)

    monkeypatch.setattr(synthetic, "load", three)
    study = train(tmp_path / "study", "tiny", epochs=2, train_limit=128)
    bundle = export(find(study, None, None), tmp_path / "bundle", None, None)
    assert (bundle.classes, bundle.positive, bundle.threshold) == (classes, None, None)
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "Decided is the most probable class" in card and "knows 3 classes" in card
    assert bundle.manifest["program"]["gives"] == "logits (B, 3)"
    own = predicted(study, study.rows[0])
    assert own is not None
    predictor, images = Predictor.load(tmp_path / "bundle", "cpu"), np.asarray(three().val.images)
    probs = calibrated(own["val"].logits, bundle.temperature)
    for one, wanted in zip(predictor.predict(list(images)), probs, strict=True):
        assert list(one.probabilities.values()) == pytest.approx(list(wanted), abs=1e-5)
        assert (one.decision, one.score) == (classes[wanted.argmax()], pytest.approx(wanted.max(), abs=1e-5))
    Image.fromarray(images[0, 0]).save(tmp_path / "one.png")
    arguments = [str(tmp_path / "bundle"), str(tmp_path / "one.png"), "--gradcam", str(tmp_path / "heat")]
    assert main(["predict", *arguments]) == 0
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert line["threshold"] == "" and line["decision"] in classes and line["probability left, or right"]
    assert (tmp_path / "heat" / "00000-one.png").exists()
    assert main(["gradcam", str(study.folder), "-o", str(tmp_path / "sheets")]) == 0
    with pytest.raises(ConfigError, match="needs two classes"):
        find(study, None, "youden")


def test_predictions_of_another_number_of_images_are_refused(trained: Study, tmp_path: Path) -> None:
    source = find(trained, None, None)
    val = source.predictions["val"]
    fewer: predictions.Predictions = {**source.predictions, "val": Predicted(val.logits[:5], val.labels[:5])}
    with pytest.raises(BundleError, match="other data"):
        export(replace(source, predictions=fewer), tmp_path / "bundle", None, None)
