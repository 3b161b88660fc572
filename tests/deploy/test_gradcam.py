"""Grad-CAM for every architecture: equal to the library's, and where the evidence is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medtune import models
from medtune.config import TrialConfig
from medtune.data.transforms import prepare
from medtune.deploy.gradcam import heat_map, overlay
from medtune.deploy.layers import blocks_of, to_maps
from medtune.deploy.likeness import PLACES, features_of, joined
from medtune.deploy.sheets import surest
from medtune.search.conductor import Report
from medtune.tracking import read_events
from medtune.trial import Attempt
from tests.support.models import FULL
from tests.support.tiny_model import tiny
from tests.test_trial import figures, play, spec

SIZE = 64


def image(side: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (1, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name).eval().requires_grad_(False)


@pytest.mark.parametrize("name", FULL)
def test_every_architecture_has_maps_and_features(name: str) -> None:
    model = built(name)
    before = model(prepare(image()[None], SIZE))
    heat = heat_map(name, model, image(), SIZE)
    assert heat.shape == (SIZE, SIZE) and heat.dtype == np.float32 and np.isfinite(heat).all()
    other = heat_map(name, model, image(), SIZE, label=0)
    assert max(heat.max(), other.max()) == 1 and heat.min() >= 0 and not np.allclose(heat, other)
    with features_of(name, model) as found:
        torch.testing.assert_close(model(prepare(image()[None], SIZE)), before)
    features = joined(found)
    assert len(found) == PLACES and features.shape[0] == 1 and torch.isfinite(features).all()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["resnet50", "vim_tiny", "vmamba_t"])
def test_maps_are_the_librarys(name: str) -> None:
    pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
    model, blocks = built(name), blocks_of(name, built(name))
    blocks = blocks_of(name, model)
    sides: list[int] = []
    hooks = [block.register_forward_hook(lambda _, i, out: sides.append(to_maps(name, out).shape[2])) for block in blocks]
    model(prepare(image()[None], SIZE))
    for hook in hooks:
        hook.remove()
    tokens = name.startswith("vim")
    fine = [block for block, side in zip(blocks[:-1] if tokens else blocks, sides, strict=False) if side >= 4]
    with pytorch_grad_cam.GradCAM(model, [fine[-1]], reshape_transform=lambda out: to_maps(name, out)) as cam:
        pixels = prepare(image()[None], SIZE).requires_grad_()
        theirs = cam(pixels, [lambda logits: logits[1] - logits[0]])[0]
    ours = heat_map(name, model, image(), SIZE)
    assert theirs.max() > 0
    # Theirs is stretched from its least to its most.
    stretched = (ours - ours.min()) / (ours.max() - ours.min())
    np.testing.assert_allclose(stretched, theirs, atol=0.02)


def test_heat_is_where_the_evidence_is() -> None:
    """A model that adds up brightness finds the bright corner."""
    model = tiny(2, 3).eval()
    for block in model.blocks:
        nn.init.constant_(block.conv.weight, 1 / 20)
        nn.init.zeros_(block.conv.bias)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 16))
    picture = torch.zeros(1, 64, 64, dtype=torch.uint8)
    picture[0, 40:60, 4:24] = 255
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._MODULES, "tiny", "tests.support.tiny_model")
        heat = heat_map("tiny", model, picture, 64)
        drawn = np.asarray(overlay("tiny", model, picture, 64)).astype(int)
    assert heat[40:60, 4:24].mean() > 4 * heat[:24, 40:].mean()
    assert drawn.shape == (64, 64, 3) and (drawn.max(axis=2) - drawn.min(axis=2))[40:60, 4:24].max() > 30


def test_sheets_show_the_surest_of_every_decided_class() -> None:
    positive = np.array([0.9, 0.8, 0.7, 0.95, 0.1, 0.2, 0.45])
    labels = np.array([1, 1, 0, 0, 0, 1, 0])
    found = surest(np.stack((1 - positive, positive), axis=1), labels)
    assert set(found["hits"][:2]) == {0, 4} and set(found["hits"]) == {0, 1, 4, 6}
    assert set(found["misses"][:2]) == {3, 5} and set(found["misses"]) == {2, 3, 5}


def test_a_trials_wandb_run_shows_its_hits_and_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrialConfig(
        model="tiny", pair="synthetic", image_size=32, epochs=2, train_limit=32, external_limit=16, resamples=20
    )

    def trained(folder: Path) -> tuple[Attempt, Report]:
        attempt = Attempt(spec(config, folder, wandb="auto"))
        return attempt, play(attempt, 2)[-1]

    last = trained(tmp_path / "a")[1]
    drawn = {path.name.split("_")[0] for path in tmp_path.rglob("media/images/gradcam/*.png")}
    assert last.status == "complete" and drawn == {"external-hits", "external-misses"}

    monkeypatch.setattr("medtune.deploy.sheets.overlay", lambda *_: 1 / 0)
    attempt, other = trained(tmp_path / "b")
    assert figures(other) == figures(last), "a picture is no reason to fail"
    assert any("no Grad-CAM" in event["message"] for event in read_events(attempt.record.folder))
