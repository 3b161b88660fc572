"""Vim against a slow float64 version of its description, token by token, that shares none of its code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medtune.models import build
from medtune.models.vim import Layer, Vim
from tests.support.models import assert_equals_exact

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_direction(p: dict[str, Tensor], x: Tensor, mark: str) -> Tensor:
    """One direction of one image: x (L, D), in the order it is read; mark: "" or "_b"."""
    weight, bias = p[f"conv1d{mark}.weight"][:, 0], p[f"conv1d{mark}.bias"]
    a, skip = -torch.exp(p["A_b_log" if mark else "A_log"]), p[f"D{mark}"]
    rank, states = p[f"dt_proj{mark}.weight"].shape[1], a.shape[1]
    h, out = torch.zeros_like(a), []
    for t in range(len(x)):
        seen = bias.clone()
        for back in range(min(4, t + 1)):
            seen = seen + weight[:, 3 - back] * x[t - back]
        u = seen * torch.sigmoid(seen)
        step, b, c = (p[f"x_proj{mark}.weight"] @ u).split((rank, states, states))
        dt = torch.log1p(torch.exp(p[f"dt_proj{mark}.weight"] @ step + p[f"dt_proj{mark}.bias"]))
        h = torch.exp(dt[:, None] * a) * h + dt[:, None] * b * u[:, None]
        out.append(h @ c + skip * u)
    return torch.stack(out)


def slow_model(p: dict[str, Tensor], image: Tensor, layers: int) -> Tensor:
    """One image (C, 224, 224) -> logits (K)."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    patches = F.conv2d(image[None], p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=16)[0]
    tokens = [patches[:, i, j] for i in range(14) for j in range(14)]
    tokens.insert(98, p["cls_token"][0, 0])
    residual = torch.stack(tokens) + p["pos_embed"][0]
    for i in range(layers):
        mixer = {k.removeprefix(f"layers.{i}.mixer."): v for k, v in p.items() if k.startswith(f"layers.{i}.mixer.")}
        x, z = (norm(residual, p[f"layers.{i}.norm.weight"]) @ mixer["in_proj.weight"].T).chunk(2, dim=-1)
        both = slow_direction(mixer, x, "") + slow_direction(mixer, x.flip(0), "_b").flip(0)
        residual = residual + (both * z * torch.sigmoid(z) / 2) @ mixer["out_proj.weight"].T
    return p["head.weight"] @ norm(residual[98], p["norm_f.weight"]) + p["head.bias"]


def test_equals_the_description() -> None:
    torch.manual_seed(1)
    model = Vim(32, layers=2, num_classes=3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    exact_weights = {k: v.detach().double().requires_grad_() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 224, 224)
    exact = torch.stack([slow_model(exact_weights, image.double(), 2) for image in x])
    assert_equals_exact(model, model(x), exact, exact_weights)


def test_positions_of_other_grids() -> None:
    model = Vim(8, layers=1)
    assert model.positions(14, 14) is model.pos_embed
    rows, columns = torch.arange(14.0), torch.arange(14.0)
    with torch.no_grad():  # what is linear in row and column stays so; the class token's position is its own
        grid = (rows[:, None] * 100 + columns).flatten()
        model.pos_embed.copy_(torch.cat((grid[:98], torch.tensor([-1.0]), grid[98:]))[None, :, None].expand(1, -1, 8))
        wide = model.positions(14, 28)[0, :, 0]
    middle = 14 * 28 // 2
    assert len(wide) == 14 * 28 + 1 and wide[middle] == -1
    wide = torch.cat((wide[:middle], wide[middle + 1 :])).view(14, 28)
    expected = rows[:, None] * 100 + (torch.arange(28.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(wide[:, 4:-4], expected[:, 4:-4], rtol=1e-4, atol=1e-3)


def test_every_pixel_of_an_odd_size_is_seen() -> None:
    torch.manual_seed(0)
    model = build("vim_tiny").eval()
    image = torch.randn(1, 3, 28, 35, requires_grad=True)
    model(image)[0, 0].backward()
    assert image.grad is not None and image.grad.abs().sum(1).min() > 0


def test_residual_stays_float32_under_autocast() -> None:
    model = Vim(32, layers=3).train()
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, out: seen.extend([args[0].dtype, out.dtype]))
        layer.mixer.register_forward_hook(lambda mixer, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32))
    assert seen == [torch.bfloat16, torch.float32, torch.float32] * 3


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = build("vim_tiny")
    mixer = model.layers[5].mixer
    for a_log, skip, bias in ((mixer.A_log, mixer.D, mixer.dt_proj.bias), (mixer.A_b_log, mixer.D_b, mixer.dt_proj_b.bias)):
        assert torch.allclose(a_log, torch.arange(1.0, 17).log().expand(384, 16))
        assert torch.equal(skip, torch.ones(384))
        step = F.softplus(bias)
        assert 0.9e-3 < step.min() < 2e-3 and 0.05 < step.max() < 0.101
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.out_proj.weight.std().item() == pytest.approx((3 * 384 * 24) ** -0.5, rel=0.05)
    assert model.head.bias.abs().sum() == 0


@pytest.mark.parametrize("name, width", [("vim_tiny", 192), ("vim_small", 384)])
def test_sizes(name, width) -> None:
    with torch.device("meta"):
        model = build(name)
    assert model.pos_embed.shape == (1, 197, width)
    assert [type(layer) for layer in model.layers] == [Layer] * 24
    rates = [layer.drop_path.drop_prob for layer in model.layers]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.1) and rates == sorted(rates)
