"""Testing a model: predictions, the external test twice, and any checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import medtune.evaluate
from medtune import metrics
from medtune.checkpoint import CheckpointStore
from medtune.config import TrialConfig
from medtune.data import PairData
from medtune.data.transforms import match_resolution, prepare
from medtune.errors import CheckpointError, MedtuneError
from medtune.evaluate import evaluate_checkpoint, external_test, own_test, predict, resolve_precision
from medtune.training import fit
from tests.conftest import TinyNet, split

Make = Callable[..., TrialConfig]
CPU = torch.device("cpu")


@pytest.fixture
def model() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(2, 3)


def test_predictions_are_those_of_the_resized_images_in_eval_mode(model: TinyNet) -> None:
    images = split(130)
    logits = predict(model, images, 36, CPU)
    assert model.training
    assert (logits.shape, logits.dtype) == ((130, 2), torch.float32)
    with torch.no_grad():
        wanted = model.eval()(prepare(torch.tensor(images.images), 36))
    torch.testing.assert_close(logits, wanted)


def test_matched_images_are_brought_down_first(model: TinyNet) -> None:
    images = split(20, side=60)
    small = dataclasses.replace(images, images=match_resolution(torch.tensor(images.images), 28).numpy())
    matched = predict(model, images, 56, CPU, matched=28)
    torch.testing.assert_close(matched, predict(model, small, 56, CPU))
    assert not torch.allclose(matched, predict(model, images, 56, CPU))


def test_external_test_is_done_twice(model: TinyNet, tiny_config: Make, tiny_data: PairData) -> None:
    found = external_test(model, tiny_config(image_size=40), tiny_data, CPU)
    assert found["external/n"] == 30 and found["external/name"] == "synthetic"
    for prefix, matched in (("external", None), ("external_matched", 28)):
        logits = predict(model, tiny_data.external, 40, CPU, matched=matched).numpy()
        wanted = metrics.classification(metrics.softmax(logits), tiny_data.external.labels)
        bounds = metrics.intervals(metrics.softmax(logits), tiny_data.external.labels, 50)
        for name, value in wanted.items():
            assert found[f"{prefix}/{name}"] == value
            assert (found[f"{prefix}/{name}/low"], found[f"{prefix}/{name}/high"]) == bounds[name]
    assert found["external/auc"] != found["external_matched/auc"]
    assert "external/loss" not in found
    assert np.sum(found["curves"]["confusion"]) == 30 and found["curves"]["classes"] == ["normal", "pneumonia"]
    assert found["curves"]["roc"]["tpr"][-1] == 1
    assert found["curves"]["matched"].keys() == {"roc", "confusion", "classes"}
    logits = found.pop("predictions")
    assert logits.keys() == {"external", "external_matched"}
    probs, labels = metrics.softmax(logits["external"].logits), logits["external"].labels
    assert metrics.classification(probs, labels)["auc"] == found["external/auc"]
    json.dumps(found, allow_nan=False)


def test_figures_of_a_stand_in_never_read_as_cpn(model: TinyNet, tiny_config: Make, tiny_data: PairData) -> None:
    assert not [key for key in external_test(model, tiny_config(), tiny_data, CPU) if key.startswith("cpn")]
    real = dataclasses.replace(tiny_data, verified_cpn=True, external_name="cpn")
    found = external_test(model, tiny_config(), real, CPU)
    copies = {key: value for key, value in found.items() if key.startswith("cpn")}
    assert {"cpn/auc", "cpn/auc/low", "cpn_matched/auc", "cpn_matched/oa/high"} <= copies.keys()
    assert copies == {key: found[key.replace("cpn", "external", 1)] for key in copies}


def test_what_is_undefined_is_missing_with_the_reason(model: TinyNet, tiny_config: Make, tiny_data: PairData) -> None:
    only = dataclasses.replace(tiny_data.external, labels=np.zeros(30, dtype=np.int64))
    found = external_test(model, tiny_config(), dataclasses.replace(tiny_data, external=only), CPU)
    assert found["external/auc"] is None and found["external/auc/low"] is None
    assert found["external/auc/reason"] == "no image of class 1"
    assert found["external/specificity"] is not None and "external/specificity/reason" not in found
    assert found["curves"]["roc"] == {"fpr": [], "tpr": []}


def test_no_resamples_no_intervals(model: TinyNet, tiny_config: Make, tiny_data: PairData) -> None:
    found = external_test(model, tiny_config(resamples=0), tiny_data, CPU)
    assert found["external/auc"] is not None and "external/auc/low" not in found


def test_own_test_split(model: TinyNet, tiny_config: Make, tiny_data: PairData) -> None:
    found = own_test(model, tiny_config(), tiny_data, CPU)
    logits = predict(model, tiny_data.test, 28, CPU).numpy()
    assert found["test/n"] == 22 and found["test/loss"] == metrics.cross_entropy(logits, tiny_data.test.labels)
    assert found["test/oa/low"] <= found["test/oa"] <= found["test/oa/high"]
    assert (found["predictions"]["test"].logits == logits).all()
    assert (found["predictions"]["val"].logits == predict(model, tiny_data.val, 28, CPU).numpy()).all()


def test_output_that_is_not_finite_is_an_error(model: TinyNet, tiny_config: Make, tiny_data: PairData) -> None:
    nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(MedtuneError, match="not finite for 30 of 30 external images"):
        external_test(model, tiny_config(), tiny_data, CPU)


def test_precision_on_cpu() -> None:
    assert [resolve_precision(p, CPU) for p in ("auto", "bf16", "fp32")] == ["fp32", "bf16", "fp32"]


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_on_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wanted: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == wanted
    assert resolve_precision("fp32", torch.device("cuda")) == "fp32"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tiny_data: PairData) -> list[dict[str, Any]]:
    """evaluate_checkpoint gets the tiny data; how it asked for them is kept."""
    asked: list[dict[str, Any]] = []

    def load_pair(name: str, **kwargs: Any) -> PairData:
        asked.append({"name": name, **kwargs})
        return tiny_data

    monkeypatch.setattr(medtune.evaluate, "load_pair", load_pair)
    return asked


def test_own_checkpoint_to_all_figures(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path, loaded: list[dict[str, Any]]
) -> None:
    config = tiny_config(lr=0.05, external_limit=4)
    fitting = fit(config, tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path))
    for _ in fitting:
        pass
    wanted = external_test(fitting.best_model(), config.replace(resamples=20), tiny_data, CPU)
    del wanted["predictions"]
    for path in (tmp_path, tmp_path / f"best-{fitting.best_epoch:04d}.safetensors"):
        found = evaluate_checkpoint(path, resamples=20, external_dir=Path("there"), device=CPU)
        assert found["val/loss"] == fitting.best_value and found["epoch"] == fitting.best_epoch
        assert found["model"] == "tiny" and found["image_size"] == 28 and found["warnings"] == []
        assert {key: found[key] for key in wanted} == wanted  # all 30 external images
        assert "test/auc/low" in found
        json.dumps(found, allow_nan=False)
    assert loaded[0] == {"name": "synthetic", "native_size": 28, "data_dir": None, "external_dir": Path("there")}

    last = evaluate_checkpoint(tmp_path / "last-0004.safetensors", resamples=0, device=CPU)
    assert last["epoch"] == 4 and last["val/auc"] == fitting.history[-1].metrics["val/auc"]
    assert evaluate_checkpoint(tmp_path, external_limit=4, resamples=0, device=CPU)["external/n"] == 4


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "parallel", "safetensors"])
def test_published_weights_to_all_figures(
    model: TinyNet, tiny_config: Make, tiny_data: PairData, tmp_path: Path, loaded: list[dict[str, Any]], wrap: str
) -> None:
    config = tiny_config(image_size=32, resamples=20)
    weights = model.state_dict()
    path = tmp_path / ("weights.safetensors" if wrap == "safetensors" else "weights.pth")
    if wrap == "safetensors":
        save_file(weights, path)
    elif wrap == "parallel":
        torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, path)
    else:
        torch.save(weights if wrap == "plain" else {wrap: weights, "epoch": 3}, path)
    found = evaluate_checkpoint(path, model="tiny", pair="synthetic", image_size=32, resamples=20, device=CPU)
    wanted = external_test(model, config, tiny_data, CPU)
    del wanted["predictions"]
    assert {key: found[key] for key in wanted} == wanted and found["epoch"] is None


def test_wrong_model_is_named(
    model: TinyNet, tiny_config: Make, tiny_data: PairData, tmp_path: Path, loaded: list[dict[str, Any]]
) -> None:
    tiny_config()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth does not say which model .*--model \(one of tiny, tiny2\)"):
        evaluate_checkpoint(tmp_path / "w.pth", device=CPU)
    with pytest.raises(CheckpointError, match=r"w\.pth as tiny2: the checkpoint does not fit"):
        evaluate_checkpoint(tmp_path / "w.pth", model="tiny2", device=CPU)
    next(fit(tiny_config(), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path)))
    with pytest.raises(CheckpointError, match="is of model tiny, not tiny2"):
        evaluate_checkpoint(tmp_path / "best-0001.safetensors", model="tiny2", device=CPU)


def test_damaged_checkpoint_is_not_tested(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path, loaded: list[dict[str, Any]]
) -> None:
    next(fit(tiny_config(), tiny_data, device=CPU, checkpoints=CheckpointStore(tmp_path)))
    path = tmp_path / "best-0001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged: its SHA-256"):
        evaluate_checkpoint(path, device=CPU)


def test_other_validation_images_are_warned_of(
    tiny_config: Make, tiny_data: PairData, tmp_path: Path, loaded: list[dict[str, Any]]
) -> None:
    other = dataclasses.replace(tiny_data, fingerprint={**tiny_data.fingerprint, "val": "other"})
    next(fit(tiny_config(), other, device=CPU, checkpoints=CheckpointStore(tmp_path)))
    [warning] = evaluate_checkpoint(tmp_path, resamples=0, device=CPU)["warnings"]
    assert "not those that this checkpoint was selected on" in warning
