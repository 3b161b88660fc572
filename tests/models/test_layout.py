"""Channels last where it pays, and what an optimizer keeps laid out like its weights."""

import pytest
import torch
from torch import nn

from medtune import models
from medtune.models.layout import to_device
from medtune.training import laid_out_alike


def has_channels_last(model: nn.Module) -> bool:
    maps = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:3]) > 1]
    return all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in maps)


@pytest.mark.parametrize(("name", "last"), [("resnet50", True), ("medvit_small", True), ("vmamba_t", False)])
def test_convolutional_models_have_channels_last_off_the_cpu(name, last) -> None:
    with torch.device("meta"):
        model = models.build(name)
    assert has_channels_last(to_device(model, torch.device("meta"))) == last


def test_medmambas_blocks_have_their_filters_so() -> None:
    with torch.device("meta"):
        model = to_device(models.build("medmamba_t"), torch.device("meta"))
    filters = [m.weight for m in model.layers.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert filters and all(f.is_contiguous(memory_format=torch.channels_last) for f in filters)
    assert model.patch_embed.proj.weight.is_contiguous()


def test_on_a_cpu_and_with_activation_checkpointing() -> None:
    with torch.device("meta"):
        model = models.build("resnet50")
    models.checkpoint_activations(model)
    assert has_channels_last(to_device(model, torch.device("meta")))
    model = models.build("resnet50")
    assert not has_channels_last(to_device(model, torch.device("cpu")))


def test_a_loaded_optimizers_state_gets_its_weights_strides() -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(conv.parameters())
    conv(torch.rand(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    loaded = torch.optim.AdamW(conv.parameters())
    before = {key: value.contiguous() for key, value in optimizer.state[conv.weight].items()}
    state = optimizer.state_dict()["state"] | {0: before}
    loaded.load_state_dict({**loaded.state_dict(), "state": state})
    assert loaded.state[conv.weight]["exp_avg"].stride() != conv.weight.stride()
    laid_out_alike(loaded)
    found = loaded.state[conv.weight]
    assert found["exp_avg"].stride() == found["exp_avg_sq"].stride() == conv.weight.stride()
    assert all(torch.equal(found[key], before[key]) for key in before)
