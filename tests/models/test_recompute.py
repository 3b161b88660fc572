"""Activation checkpointing changes memory alone: values, gradients, statistics and random numbers stay."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.models import build, checkpoint_activations, modules
from tests.support.models import FULL

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(name: str, recompute: bool, bf16: bool = False, copied: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model after one training step, and its output, gradients, buffers and the random number that comes next."""
    torch.manual_seed(0)
    model = build(name).train()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.3
    if recompute:
        checkpoint_activations(model)
    model = copy.deepcopy(model) if copied else model
    images = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(images)
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 1, 0])).backward()
    found = {f"gradient of {k}": p.grad for k, p in model.named_parameters()}
    return model, {"logits": logits, **found, **dict(model.named_buffers()), "random": torch.rand(1)}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_equals_training_without(name, bf16) -> None:
    plain, expected = trained(name, False, bf16)
    model, found = trained(name, True, bf16, copied=True)
    assert found.keys() == expected.keys() and list(model.state_dict()) == list(plain.state_dict())
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    model.eval(), plain.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("name", FULL)
def test_with_synchronised_batchnorm(name) -> None:
    """As a trial on several GPUs has it; alone it synchronises nothing, and so runs on a CPU."""
    model = build(name).train()
    checkpoint_activations(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    counters = [v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert all(counter == 1 for counter in counters)


@pytest.mark.parametrize("name", FULL)
def test_blocks_compute_again_in_training_alone(name) -> None:
    torch.manual_seed(0)
    model = build(name)
    kinds = tuple(k for m in modules() for k in importlib.import_module(m).BLOCKS)
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    assert blocks
    calls = [0]
    for block in blocks:  # its first layer runs once for every time the block is computed
        first = next(module for module in block.modules() if module is not block and not list(module.children()))
        first.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    checkpoint_activations(model)
    checkpoint_activations(model)  # twice is once
    x = torch.randn(2, 3, 32, 32)
    model.eval()(x).sum().backward()
    assert calls[0] == len(blocks)
    model.train()(x).sum().backward()
    assert calls[0] == 3 * len(blocks)
    with torch.no_grad():
        model(x)
    assert calls[0] == 4 * len(blocks)


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(recompute: bool) -> int:
        model, sizes = build("vmamba_t").train(), {}
        if recompute:
            checkpoint_activations(model)

        def count(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits = model(torch.randn(2, 3, 64, 64))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert logits.requires_grad
        return sum(size for at, size in sizes.items() if at not in weights)

    assert kept(True) < 0.3 * kept(False)


def test_model_without_known_blocks() -> None:
    build("resnet50")
    with pytest.raises(ValueError, match="Linear has no blocks"):
        checkpoint_activations(nn.Linear(2, 2))
