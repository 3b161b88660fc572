"""Starting from others' weights: files of either layout, timm's, and all that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.models.resnet
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medtune.checkpoint import CheckpointStore, Snapshot
from medtune.config import TrialConfig
from medtune.errors import CheckpointError, ConfigError
from medtune.models import build, check_pretrained, load_pretrained
from medtune.models.published import CLASSIFIERS
from tests.support.models import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


def other_weights(name: str, classes: int = 2, channels: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return build(name, num_classes=classes, in_channels=channels).state_dict()


def saved(folder: Path, name: str, suffix: str = ".safetensors", **numbers: int) -> tuple[str, dict[str, Tensor]]:
    weights, path = other_weights(name, **numbers), folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"epoch": 300, "model": {f"module.{k}": v for k, v in weights.items()}}, path)
    return str(path), weights


@pytest.mark.parametrize("name", SMALL)
def test_classifier_of_another_width_is_replaced_and_noted(tmp_path, name) -> None:
    source, weights = saved(tmp_path, name, classes=9)
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_pretrained([name], source)
    (note,) = load_pretrained(name, model, source)
    replaced = [k for k, v in model.state_dict().items() if weights[k].shape != v.shape]
    (layer,) = {k.rpartition(".")[0] for k in replaced}
    assert layer in CLASSIFIERS and len(replaced) == 2
    assert layer in note and "for 9 classes" in note and "for 2" in note
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in replaced else weights[key]), key


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_same_width_is_loaded_whole(tmp_path, suffix) -> None:
    source, weights = saved(tmp_path, "vim_tiny", suffix)
    model = build("vim_tiny")
    assert load_pretrained("vim_tiny", model, source) == []
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def refused(name: str, source: str, model: nn.Module | None = None) -> str:
    """What both calls say."""
    messages = set()
    for call in (lambda: check_pretrained([name], source), lambda: load_pretrained(name, model or build(name), source)):
        with pytest.raises(CheckpointError) as error:
            call()
        messages.add(str(error.value))
    (message,) = messages
    return message


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path) -> None:
    weights = other_weights("vmamba_t", classes=9)
    weights["extra.weight"] = weights.pop("layers.1.blocks.0.op.A_logs")
    save_file(weights, tmp_path / "weights.safetensors")
    model = build("vmamba_t")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    said = refused("vmamba_t", str(tmp_path / "weights.safetensors"), model)
    assert "as vmamba_t" in said and "missing in the checkpoint (1): layers.1.blocks.0.op.A_logs" in said
    assert "unknown to the model (1): extra.weight" in said
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "name, key",
    [("medvit_small", "stem.0.conv.weight"), ("resnet50", "conv1.weight"), ("vim_tiny", "patch_embed.proj.weight")],
)
def test_input_convolution_is_not_adapted(tmp_path, name, key) -> None:
    said = refused(name, saved(tmp_path, name, channels=1)[0])
    assert key in said and "for images of 1 channels, the model for 3" in said


def test_space_of_several_models_fails_for_the_one_that_does_not_fit(tmp_path) -> None:
    source, _ = saved(tmp_path, "medmamba_t")
    with pytest.raises(CheckpointError, match=r"as medmamba_s: .*does not fit"):
        check_pretrained(["medmamba_t", "medmamba_s"], source)


@pytest.fixture
def ours(tmp_path) -> str:
    """A checkpoint of our own."""
    weights = other_weights("vim_tiny")
    snapshot = Snapshot(
        epoch=1, config=TrialConfig(model="vim_tiny", pair="synthetic"), fingerprint={}, model=weights, optimizer={},
        best_epoch=1, best=weights, progress={},
    )  # fmt: skip
    CheckpointStore(tmp_path).save(snapshot)
    return str(tmp_path)


def test_our_own_checkpoint(ours) -> None:
    model, weights = build("vim_tiny"), other_weights("vim_tiny")
    check_pretrained(["vim_tiny"], ours)
    assert load_pretrained("vim_tiny", model, ours) == []
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_our_own_checkpoint_of_another_model(ours) -> None:
    assert "is of model vim_tiny, not vmamba_t" in refused("vmamba_t", ours)


def test_file_that_is_not_there(tmp_path) -> None:
    assert "does not exist" in refused("vim_tiny", str(tmp_path / "none.safetensors"))


def test_timm_has_weights_for_resnet50_alone() -> None:
    for call in (lambda: check_pretrained(["vim_tiny"], "timm"), lambda: load_pretrained("vim_tiny", nn.Module(), "timm")):
        with pytest.raises(ConfigError, match=r"no weights for vim_tiny .*for resnet50 alone"):
            call()


def test_timms_weights(monkeypatch) -> None:
    """Stands in for the download only."""
    real = timm.models.resnet.resnet50

    def downloaded(pretrained: bool) -> nn.Module:
        assert pretrained
        return real(pretrained=False)

    monkeypatch.setattr(timm.models.resnet, "resnet50", downloaded)
    torch.manual_seed(0)
    model = build("resnet50")
    check_pretrained(["resnet50"], "timm")
    state = torch.random.get_rng_state()
    origin, classifier = load_pretrained("resnet50", model, "timm")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "timm's resnet50.a1_in1k" in origin and "fc was for 1000 classes" in classifier
    torch.manual_seed(0)
    build("resnet50")  # the stand-in's weights are the random numbers that came after
    torch.random.set_rng_state(state)
    assert torch.equal(model.layer4[0].conv1.weight, real().layer4[0].conv1.weight)


def test_no_network_for_timm(monkeypatch) -> None:
    def offline(pretrained: bool) -> nn.Module:
        raise OSError("name resolution failed\nand more")

    monkeypatch.setattr(timm.models.resnet, "resnet50", offline)
    said = refused("resnet50", "timm", nn.Module())
    assert "name resolution failed. Without the network: download" in said and "--pretrained" in said
