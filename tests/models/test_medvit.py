"""MedViT: its blocks, tiny maps and the patch momentum changer; that it computes the published model is shown in
test_parity.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medtune.errors import ConfigError
from medtune.models import available, build, has_patch_momentum
from medtune.models.medvit import ECB, LTB, Attention, PatchEmbed, exchange_moments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name, repeats, drop_path", [("medvit_small", 2, 0.1), ("medvit_base", 4, 0.2), ("medvit_large", 6, 0.2)]
)
def test_sizes(name, repeats, drop_path) -> None:
    with torch.device("meta"):
        model = build(name)
    third = [ECB] * 4 + [LTB]
    assert [type(block) for block in model.features] == [ECB] * 6 + [LTB] + third * repeats + [ECB] * 2 + [LTB]
    rates = [block.drop_path.drop_prob for block in model.features if isinstance(block, ECB)]
    assert rates[0] == 0 and rates == sorted(rates)
    last = model.features[-1]
    assert last.drop_attention.drop_prob == pytest.approx(0.75 * drop_path)
    assert last.drop_local.drop_prob == pytest.approx(0.25 * drop_path)
    attended = [block.e_mhsa.q.in_features for block in model.features if isinstance(block, LTB)]
    assert attended == [192] + [384] * repeats + [768]


def slow_attention(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """One image (L, C), statistics as stored; runs of `layer.run` tokens, what is left over left out."""
    runs = [x[i : i + layer.run].mean(0) for i in range(0, len(x) - layer.run + 1, layer.run)]
    pooled = torch.stack(runs or [x.mean(0)])
    norm = layer.norm
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
    pooled = (pooled - norm.running_mean) * scale + norm.bias
    q, k, v = layer.q(x), layer.k(pooled), layer.v(pooled)
    heads = []
    for start in range(0, x.shape[1], 32):
        part = slice(start, start + 32)
        weights = torch.softmax(q[:, part] @ k[:, part].T * 32**-0.5, dim=-1)
        heads.append(weights @ v[:, part])
    return layer.proj(torch.cat(heads, dim=1))


@pytest.mark.parametrize("length", [1, 3, 4, 8, 11])
def test_keys_and_values_are_means_over_runs(length) -> None:
    torch.manual_seed(0)
    layer = Attention(64, run=4).double().eval()
    with torch.no_grad():
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2)
        layer.norm.weight.normal_()
        layer.norm.bias.normal_()
        x = torch.randn(2, length, 64, dtype=torch.float64)
        torch.testing.assert_close(layer(x), torch.stack([slow_attention(layer, image) for image in x]))


def test_pooling_rounds_up_and_does_not_count_what_is_not_there() -> None:
    layer = PatchEmbed(1, 1, stride=2).eval()
    with torch.no_grad():
        layer.conv.weight.fill_(1)
        pooled = layer(torch.arange(9.0).view(1, 1, 3, 3)) * (1 + 1e-5) ** 0.5  # BatchNorm's eps
        assert layer(torch.ones(1, 1, 1, 1)).shape == (1, 1, 1, 1)
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[2.0, 3.5], [6.5, 8.0]]))


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = build("medvit_small")
    for weight in (model.features[8].mhca.group_conv3x3.weight, model.features[6].e_mhsa.q.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.features[6].e_mhsa.q.bias.abs().sum() == 0


def test_moments_are_exchanged_position_by_position() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16, 2, 5) * torch.tensor([1.0, 3.0, 5.0])[:, None, None, None] + 1
    partners = torch.tensor([1, 0, 2])
    mixed = exchange_moments(x, partners)
    torch.testing.assert_close(mixed.mean(1), x.mean(1)[partners])
    torch.testing.assert_close(mixed.std(1), x.std(1)[partners], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[2], x[2])
    standard = [(v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True) for v in (mixed, x)]
    torch.testing.assert_close(*standard, rtol=1e-3, atol=1e-3)


def test_partners_change_training_alone_and_only_where_asked_for() -> None:
    torch.manual_seed(0)
    model = build("medvit_small", patch_momentum=True)
    x, partners = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 0])
    with torch.no_grad():
        assert torch.equal(model.eval()(x, partners), model(x))
        model.train()
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0
        plain, mixed, own = model(x), model(x, partners), model(x, torch.arange(4))
    assert not torch.allclose(plain, mixed, atol=1e-4)
    torch.testing.assert_close(plain, own, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(x, partners).float(), torch.tensor([0, 1, 1, 0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="without patch_momentum"):
        build("medvit_small").train()(x, partners)


def test_same_weights_with_and_without_the_changer() -> None:
    torch.manual_seed(0)
    plain = build("medvit_small").state_dict()
    torch.manual_seed(0)
    changing = build("medvit_small", patch_momentum=True).state_dict()
    assert plain.keys() == changing.keys() and all(torch.equal(v, changing[k]) for k, v in plain.items())


@pytest.mark.parametrize("name", available())
def test_other_models_have_no_changer(name) -> None:
    if name.startswith("medvit"):
        assert has_patch_momentum(name)
    else:
        assert not has_patch_momentum(name)
        with pytest.raises(ConfigError, match=f"not there for {name}; models that have it: medvit_base, medvit_large"):
            build(name, patch_momentum=True)
