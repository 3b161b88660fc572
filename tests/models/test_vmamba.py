"""VMamba: its sizes and initial values; that it computes the published model is shown in test_parity.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medtune.models import build

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
