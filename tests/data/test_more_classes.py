"""Seven classes in colour, from the file to W&B: what was written for two grey ones holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medtune import trial as trial_module
from medtune.config import TrialConfig
from medtune.results import print_figures
from medtune.trial import Attempt, AttemptSpec
from tests.support.wandb_files import read
from tests.support.wandb_home import isolate

PAIR = "medmnist:dermamnist"


@pytest.fixture
def data(tmp_path: Path, write_npz: Callable[..., Path], small_medmnist: None) -> Path:
    """DermaMNIST's file in little; how red an image is tells its class."""
    path = write_npz(tmp_path / "data", name="dermamnist")
    with np.load(path) as npz:
        content = dict(npz)
    for split in ("train", "val", "test"):
        content[f"{split}_images"][..., 0] = 30 * content[f"{split}_labels"][:, :, None]
    np.savez(path, **content)
    return path.parent


def test_an_attempt_from_the_file_to_wandb(
    data: Path,
    tiny_config: Callable[..., TrialConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("medtune.deploy.sheets.sheets", lambda *_: {})  # the tiny model has no blocks to draw
    trial_module._data.cache_clear()
    config = tiny_config(pair=PAIR, epochs=2, train_limit=21, selection="val/auc", imbalance="balanced", augmentation=0.5)
    spec = AttemptSpec(
        number=0, attempt=1, config=config.to_dict(), study="s-1", folder=str(tmp_path / "study"), rungs=(1,),
        data_dir=str(data), external_dir=None, external_fallback=False, wandb="offline", wandb_project="p", threads=1,
    )
    attempt = Attempt(spec)
    reports = [attempt.next_report() for _ in range(2)]
    last = reports[-1]
    assert [report.status for report in reports] == ["running", "complete"], last.cause
    external = last.external
    assert external["external/name"] == "dermamnist-test" and external["external/n"] == 14
    for name in ("oa", "auc", "sensitivity", "specificity", "f1"):
        low, value, high = (external[f"external/{name}{end}"] for end in ("/low", "", "/high"))
        assert 0 <= low <= value <= high <= 1
        assert external[f"test/{name}"] == value
    assert last.value == last.best["val/auc"]

    print_figures(external)
    assert "dermamnist-test, 14 images" in capsys.readouterr().out

    (file,) = (tmp_path / "study" / "wandb").glob("offline-run-*/*.wandb")
    run = read(file)
    assert run.exit_code == 0 and run.epochs == [1, 2] and run.history[0]["external/auc"] is not None
    tables = {}
    for kind in ("roc", "confusion"):
        assert f"curves/external/{kind}" in run.plots
        path = file.parent / "files" / run.history[0][f"curves/external/{kind}_table"]["path"]
        tables[kind] = json.loads(path.read_text())["data"]
    classes = set(trial_module._data(PAIR, 28, str(data), None, False).classes)
    assert {row[2] for row in tables["roc"]} == classes and len(classes) == 7
    assert len(tables["confusion"]) == 49 and sum(row[2] for row in tables["confusion"]) == 14
    assert not (tmp_path / "study" / "trials" / "0000" / "attempt-1" / "events.jsonl").exists(), "nothing went wrong"
