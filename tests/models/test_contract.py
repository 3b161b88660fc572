"""What every registered model must do."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from medtune.errors import CheckpointError, ConfigError
from medtune.models import available, build, load_published, module_of, modules
from tests.support.models import FULL, SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = available()

PARAMETERS = {
    "medmamba_t": (15_221_608, 14_454_146),
    "medmamba_s": (19_389_544, 18_622_082),
    "medmamba_b": (40_883_688, 39_860_738),
    "medvit_small": (32_161_440, 31_138_490),
    "medvit_base": (45_430_972, 44_408_022),
    "medvit_large": (58_700_504, 57_677_554),
    "resnet50": (25_557_032, 23_512_130),
    "vim_tiny": (7_148_008, 6_955_394),  # 7.1 and 25.8 million
    "vim_small": (25_796_584, 25_412_354),
    "vmamba_t": (30_249_064, 29_481_602),  # 30.2, 50.1 and 88.6 million
    "vmamba_s": (50_147_752, 49_380_290),
    "vmamba_b": (88_557_800, 87_534_850),
}
"""With 1000 and with 2 classes; beside them what is published, where that is all there is."""
TAKEN_AWAY = re.compile(r"conv33conv33conv11\.[14]\.bias$")
"""MedMamba's biases that the norm behind them takes away again."""


@pytest.fixture(scope="module", params=FULL)
def model(request) -> nn.Module:
    """Weights as they start, but running statistics that differ from 0 and 1. In eval mode; tests leave it as it was."""
    torch.manual_seed(0)
    built = build(request.param)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return built.eval()


def images(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(height * width))


def test_every_file_has_one_that_is_tested_in_full() -> None:
    assert {module_of(name) for name in SMALL} == set(modules()) and len(SMALL) == len(modules())


@pytest.mark.parametrize("name, parameters", PARAMETERS.items())
def test_number_of_parameters(name, parameters) -> None:
    with torch.device("meta"):
        counted = [sum(p.numel() for p in build(name, num_classes=k).parameters()) for k in (1000, 2)]
    assert tuple(counted) == parameters


def test_every_model_has_its_number() -> None:
    assert set(PARAMETERS) == set(ALL)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("classes, channels", [(2, 3), (9, 1)])
def test_classes_and_channels(name, classes, channels) -> None:
    """Shapes alone, of every model; values are computed below."""
    with torch.device("meta"):
        model = build(name, num_classes=classes, in_channels=channels)
        assert model(torch.empty(2, channels, 32, 40)).shape == (2, classes)


@pytest.mark.parametrize("height, width", [(28, 28), (33, 47), (64, 28), (29, 100)])
def test_any_size(model, height, width) -> None:
    with torch.no_grad():
        logits = model(images(2, height, width))
    assert logits.shape == (2, 2)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", FULL)
def test_gradient_reaches_every_parameter(name) -> None:
    """From one of two starts: the three units of a squeeze-and-excitation of MedViT can all be off in one."""
    missing: set[str] = set(build(name).state_dict())
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build(name).train()
        with torch.no_grad():  # ResNet's branches start with a scale of 0
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        nn.functional.cross_entropy(model(images(4, 64, 64)), torch.tensor([0, 1, 1, 0])).backward()
        missing &= {key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        if not missing:
            return
    assert missing == {key for key in missing if name.startswith("medmamba") and TAKEN_AWAY.search(key)}
    assert all(not p.grad.any() for key, p in model.named_parameters() if key in missing), "zeros, as optimizers expect"


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("height, width", [(28, 28), (29, 66)])
def test_two_small_images_train(name, height, width) -> None:
    """Where a map has one position nothing decays; the optimizer still finds a gradient, of zeros."""
    torch.manual_seed(0)
    model = build(name).train()
    nn.functional.cross_entropy(model(images(2, height, width)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bf16_autocast(model) -> None:
    x = images(4, 40, 40)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.01


@pytest.mark.parametrize("name", FULL)
def test_seed_decides_the_weights(name) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build(name).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())


@pytest.mark.parametrize("name", FULL)
def test_same_seed_same_bits(name) -> None:
    """Forward and backward, stochastic depth included, with two threads."""
    torch.set_num_threads(2)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = build(name).train()
        nn.functional.cross_entropy(model(images(4, 32, 32)), torch.arange(4) % 2).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_an_image_is_judged_alone(model) -> None:
    x = images(5, 32, 32)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "wrapped"])
def test_checkpoint_round_trip(model, request, wrapped) -> None:
    file = io.BytesIO()
    state = model.state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}} if wrapped else state, file)
    file.seek(0)
    other = build(request.node.callspec.params["model"])
    load_published(other, torch.load(file, weights_only=True))
    x = images(2, 32, 32)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model(x))


def test_checkpoint_without_step_counters(model, request) -> None:
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_published(build(request.node.callspec.params["model"]), state)


def test_wrong_checkpoint_is_explained_and_changes_nothing(model) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    gone, _, odd, *_ = state
    del state[gone]
    state[odd] = torch.zeros(7, 5)
    state["extra.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        load_published(model, state)
    said = str(error.value)
    assert gone in said and "extra.weight" in said
    assert f"{odd}: (7, 5) in the checkpoint, {tuple(before[odd].shape)} in the model" in said
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state: state.pop(next(iter(state))), r"missing in the checkpoint \(1\)"),
        (lambda state: state.update(extra=torch.zeros(3)), r"unknown to the model \(1\): extra"),
    ],
    ids=["missing", "unknown"],
)
def test_one_wrong_key_is_enough(model, change, said) -> None:
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=said):
        load_published(model, state)


@pytest.mark.parametrize("name", FULL)
def test_classifier_of_another_width_is_named(name) -> None:
    with pytest.raises(CheckpointError, match=r"for 9 classes, the model for 2: build\(num_classes=9\)"):
        load_published(build(name), build(name, num_classes=9).state_dict())


def test_something_else_than_a_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="missing in the checkpoint"):
        load_published(build("resnet50"), {"epoch": 3})


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'medmamba_t'"):
        build("medmanba_t")


@pytest.mark.parametrize("numbers", [{"num_classes": 0}, {"in_channels": 0}])
def test_numbers_below_one(numbers) -> None:
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        build("resnet50", **numbers)


def test_names_are_light_to_import() -> None:
    code = "import sys, medtune.models, medtune.ops; medtune.models.available(); print({'torch', 'timm'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ALL)
def test_no_weight_decay_of_scan_parameters_and_tokens(name) -> None:
    with torch.device("meta"):
        model = build(name)
    names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    kept = ("A_logs", "Ds", "A_log", "D", "A_b_log", "D_b", "cls_token", "pos_embed")
    assert names == {key for key, _ in model.named_parameters() if key.rsplit(".", 1)[-1] in kept}
