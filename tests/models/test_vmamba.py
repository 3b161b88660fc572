"""VMamba against a slow float64 version of its description, and its sizes and initial values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medtune.models import build
from medtune.models.vmamba import VMamba
from tests.models.test_medmamba import below, slow_scan
from tests.support.models import assert_equals_exact

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name, blocks, width, expansion, drop_path",
    [
        ("vmamba_t", [2, 2, 8, 2], 96, 1, 0.2),
        ("vmamba_s", [2, 2, 15, 2], 96, 2, 0.3),
        ("vmamba_b", [2, 2, 15, 2], 128, 2, 0.6),
    ],
)
def test_sizes(name, blocks, width, expansion, drop_path) -> None:
    with torch.device("meta"):
        model = build(name)
    assert [len(stage.blocks) for stage in model.layers] == blocks
    assert model.layers[0].blocks[0].op.in_proj.weight.shape == (expansion * width, width)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(drop_path) and rates == sorted(rates)


def test_maps_halve_rounded_up() -> None:
    model = build("vmamba_t").eval()
    sides = []
    for stage in model.layers:
        stage.register_forward_hook(lambda stage, args, out: sides.append(tuple(args[0].shape[1:3])))
    with torch.no_grad():
        model(torch.randn(1, 3, 28, 50))
    assert sides == [(7, 13), (4, 7), (2, 4), (1, 2)]


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = build("vmamba_t")
    scan = model.layers[2].blocks[0].op
    assert torch.equal(scan.A_logs, torch.zeros(4 * 384, 1))  # the logarithm of 1, the only state's decay
    assert torch.equal(scan.Ds, torch.ones(4 * 384))
    step = F.softplus(scan.dt_projs_bias)
    assert 0.9e-3 < step.min() < 2e-3 and 0.05 < step.max() < 0.101
    assert scan.dt_projs.weight.abs().max() <= 24**-0.5 and scan.dt_projs.weight.std() > 0.5 * 24**-0.5
    assert scan.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.classifier["head"].bias.abs().sum() == 0


def norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Over the last axis."""
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def halve(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """(H, W, C) -> (H / 2, W / 2, K)."""
    x = x.permute(2, 0, 1)[None]
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=2, padding=1)[0].permute(1, 2, 0)


def slow_op(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The scan of one map (H, W, C)."""
    x = linear(p, "in_proj", x).permute(2, 0, 1)[None]
    x = F.silu(F.conv2d(x, p["conv2d.weight"], padding=1, groups=x.shape[1]))[0].permute(1, 2, 0)
    inner, height, width = x.shape[2], *x.shape[:2]
    x_proj, dt_projs = p["x_proj.weight"].view(4, -1, inner), p["dt_projs.weight"].view(4, inner, -1)
    stacked = {"x_proj_weight": x_proj, "dt_projs_weight": dt_projs}
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    y = torch.zeros_like(x)
    for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
        for at, value in slow_scan({**p, **stacked}, x, order, k).items():
            y[at] += value
    return linear(p, "out_proj", norm(p, "out_norm", y))


def slow_model(p: dict[str, Tensor], image: Tensor, depths: list[int]) -> Tensor:
    """One image (C, H, W) -> logits (K)."""
    x = F.gelu(norm(p, "patch_embed.2", halve(p, "patch_embed.0", image.permute(1, 2, 0))))
    x = norm(p, "patch_embed.7", halve(p, "patch_embed.5", x))
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = below(p, f"layers.{i}.blocks.{j}.")
            x = x + slow_op(below(block, "op."), norm(block, "norm", x))
            x = x + linear(block, "mlp.fc2", F.gelu(linear(block, "mlp.fc1", norm(block, "norm2", x))))
        if i < len(depths) - 1:
            x = norm(p, f"layers.{i}.downsample.3", halve(p, f"layers.{i}.downsample.1", x))
    return linear(p, "classifier.head", norm(p, "classifier.norm", x).mean((0, 1)))


@pytest.mark.parametrize("expansion, size", [(1, (36, 28)), (2, (20, 20))])
def test_equals_the_description(expansion, size) -> None:
    depths = [1, 2, 1]
    torch.manual_seed(1)
    model = VMamba(depths, 32, expansion, 0.1, num_classes=3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    exact_weights = {k: v.detach().double().requires_grad_() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, *size)
    exact = torch.stack([slow_model(exact_weights, image.double(), depths) for image in x])
    assert_equals_exact(model, model(x), exact, exact_weights)
