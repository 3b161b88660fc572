"""MedMamba against a slow float64 version of its description, position by position, that shares none of its code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.models import build
from medtune.models.layers import DropPath, from_directions, to_directions
from medtune.models.medmamba import MedMamba, PatchMerging
from tests.support.models import assert_equals_exact

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name, parameters, blocks, width",
    [
        ("medmamba_t", 14_454_146, [2, 2, 4, 2], 96),
        ("medmamba_s", 18_622_082, [2, 2, 8, 2], 96),
        ("medmamba_b", 39_860_738, [2, 2, 12, 2], 128),
    ],
)
def test_sizes(name, parameters, blocks, width) -> None:
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [len(stage.blocks) for stage in model.layers] == blocks
    assert model.patch_embed.proj.weight.shape == (width, 3, 4, 4)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.1) and rates == sorted(rates)


def slow_scan(p: dict[str, Tensor], x: Tensor, order: list[tuple[int, int]], k: int) -> dict[tuple[int, int], Tensor]:
    """One direction of one image: x (H, W, D) -> {position: y (D)}."""
    inner, states = x.shape[-1], p["A_logs"].shape[1]
    rank = p["dt_projs_weight"].shape[-1]
    a = -torch.exp(p["A_logs"][k * inner : (k + 1) * inner])
    skip = p["Ds"][k * inner : (k + 1) * inner]
    h, out = torch.zeros(inner, states, dtype=torch.float64), {}
    for at in order:
        projected = p["x_proj_weight"][k] @ x[at]
        step, b, c = projected[:rank], projected[rank : rank + states], projected[rank + states :]
        dt = torch.log1p(torch.exp(p["dt_projs_weight"][k] @ step + p["dt_projs_bias"][k]))
        h = torch.exp(dt[:, None] * a) * h + dt[:, None] * b[None] * x[at][:, None]
        out[at] = h @ c + skip * x[at]
    return out


def slow_ss2d(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """One image (H, W, d)."""
    x, z = (x @ p["in_proj.weight"].T).chunk(2, dim=-1)
    x = F.conv2d(x.permute(2, 0, 1)[None], p["conv2d.weight"], p["conv2d.bias"], padding=1, groups=x.shape[-1])
    x = (x * torch.sigmoid(x))[0].permute(1, 2, 0)
    height, width = x.shape[:2]
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    y = torch.zeros_like(x)
    for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
        for at, value in slow_scan(p, x, order, k).items():
            y[at] += value
    y = F.layer_norm(y, y.shape[-1:], p["out_norm.weight"], p["out_norm.bias"], 1e-5)
    return (y * z * torch.sigmoid(z)) @ p["out_proj.weight"].T


def below(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}


def slow_block(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """One image (H, W, C), statistics as stored."""
    half = x.shape[-1] // 2
    conv = below(p, "conv33conv33conv11.")

    def norm(v: Tensor, i: int) -> Tensor:
        mean, var = conv[f"{i}.running_mean"][:, None, None], conv[f"{i}.running_var"][:, None, None]
        weight, bias = conv[f"{i}.weight"][:, None, None], conv[f"{i}.bias"][:, None, None]
        return (v - mean) / torch.sqrt(var + 1e-5) * weight + bias

    left = norm(x[..., :half].permute(2, 0, 1), 0)
    left = norm(F.conv2d(left[None], conv["1.weight"], conv["1.bias"], padding=1)[0], 2).clamp(min=0)
    left = norm(F.conv2d(left[None], conv["4.weight"], conv["4.bias"], padding=1)[0], 5).clamp(min=0)
    left = F.conv2d(left[None], conv["7.weight"], conv["7.bias"])[0].clamp(min=0).permute(1, 2, 0)
    right = F.layer_norm(x[..., half:], (half,), p["ln_1.weight"], p["ln_1.bias"], 1e-5)
    right = slow_ss2d(below(p, "self_attention."), right)
    out = torch.empty_like(x)
    for j in range(half):
        out[..., 2 * j], out[..., 2 * j + 1] = left[..., j], right[..., j]
    return x + out


def slow_model(p: dict[str, Tensor], image: Tensor, depths: list[int]) -> Tensor:
    """One image (C, H, W) -> logits (K)."""
    x = F.conv2d(image[None], p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4)[0].permute(1, 2, 0)
    x = F.layer_norm(x, x.shape[-1:], p["patch_embed.norm.weight"], p["patch_embed.norm.bias"], 1e-5)
    for i, depth in enumerate(depths):
        for j in range(depth):
            x = slow_block(below(p, f"layers.{i}.blocks.{j}."), x)
        if i == len(depths) - 1:
            break
        rows, columns = range(x.shape[0] // 2), range(x.shape[1] // 2)
        inside = [(0, 0), (1, 0), (0, 1), (1, 1)]
        cells = [torch.cat([x[2 * r + a, 2 * c + b] for a, b in inside]) for r in rows for c in columns]
        x = torch.stack(cells).unflatten(0, (len(rows), len(columns)))
        merge = below(p, f"layers.{i}.downsample.")
        x = F.layer_norm(x, x.shape[-1:], merge["norm.weight"], merge["norm.bias"], 1e-5) @ merge["reduction.weight"].T
    return p["head.weight"] @ x.mean((0, 1)) + p["head.bias"]


def noisy(model: nn.Module) -> nn.Module:
    """Move every norm, bias, skip and statistic off its starting value: a forgotten one must show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.dim() <= 1 and value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.5)
            elif name.endswith("A_logs"):
                value.add_(0.1 * torch.randn_like(value))
            else:
                value.mul_(3 if value.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("size", [(36, 28), (20, 20)])  # maps of 9x7, 4x3, 2x1 and 5x5, 2x2, 1x1: odd and tiny ones
def test_equals_the_description(size) -> None:
    depths = [1, 2, 1]
    model = noisy(MedMamba(depths, width=32, num_classes=3)).eval()
    x = torch.randn(2, 3, *size)
    exact_weights = {k: v.detach().double().requires_grad_(v.is_floating_point()) for k, v in model.state_dict().items()}
    exact = torch.stack([slow_model(exact_weights, image.double(), depths) for image in x])
    assert_equals_exact(model, model(x), exact, exact_weights)


def test_directions_and_back() -> None:
    x = torch.arange(6.0).view(1, 2, 3, 1)
    read = [direction.flatten().tolist() for direction in to_directions(x)]
    assert read == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert torch.equal(from_directions(to_directions(x), 2, 3), 4 * x)


def test_merging_pads_a_side_of_one_and_cuts_other_odd_sides() -> None:
    merge = PatchMerging(4)
    assert merge(torch.randn(2, 1, 1, 4)).shape == (2, 1, 1, 8)
    assert merge(torch.randn(2, 1, 6, 4)).shape == (2, 1, 3, 8)
    x = torch.randn(2, 5, 3, 4)
    assert torch.equal(merge(x), merge(x[:, :4, :2]))


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = build("medmamba_t")
    scan = model.layers[2].blocks[0].self_attention
    assert torch.allclose(scan.A_logs, torch.arange(1.0, 17).log().expand(4 * 384, 16))
    assert torch.equal(scan.Ds, torch.ones(4 * 384))
    step = F.softplus(scan.dt_projs_bias)
    assert 0.9e-3 < step.min() < 2e-3 and 0.05 < step.max() < 0.101
    assert 0.0195 < model.layers[3].blocks[0].self_attention.in_proj.weight.std() < 0.0205
    assert model.head.bias.abs().sum() == 0
    conv = model.layers[1].blocks[0].conv33conv33conv11[1].weight
    assert conv.std().item() == pytest.approx((2 / (96 * 9)) ** 0.5, rel=0.05)


def test_stochastic_depth() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 2)
    kept = drop(x).amax((1, 2))
    assert kept.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert (kept > 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop.eval()(x), x)
