"""Steps of the optimizer: which kind is taken where, and, on a GPU, that a recorded step is the step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from medtune import models, steps
from medtune.config import TrialConfig
from medtune.data import PairData
from medtune.epoch import optimizer_of
from medtune.errors import ConfigError
from medtune.models import compiled as compiled_module
from medtune.models.compiled import compiled
from medtune.models.layers import DropPath
from medtune.models.parts import parts_of
from medtune.ops.beside import both
from medtune.parallel import SOLO
from medtune.steps import COMPILE, SWITCH, GraphStepper, Stepper, broken_recording, pays, stepper_of
from medtune.training import EpochResult, fit
from tests.conftest import TinyNet

Make = Callable[..., TrialConfig]
Weights = dict[str, torch.Tensor]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def stepper(config: TrialConfig) -> Stepper:
    net = TinyNet(2, 3)
    return stepper_of(net, optimizer_of(net, config, torch.device("cpu")), config, None, SOLO, 1000)


def test_a_cpu_takes_steps_kernel_by_kernel(tiny_config: Make) -> None:
    assert type(stepper(tiny_config())) is Stepper


@pytest.mark.parametrize("name", [SWITCH, COMPILE])
def test_a_switch_that_is_neither_yes_nor_no_is_refused(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ConfigError, match=f"{name} is 'maybe': 1 for yes, 0 for no"):
        stepper(tiny_config())


def test_compiling_is_for_long_trials_of_large_images() -> None:
    full = 150 * 4708
    assert pays(full, 224) and not pays(full, 64) and not pays(10 * 4708, 224)


@pytest.mark.parametrize(("name", "options"), [("medmamba_t", compiled_module.OF_ROWS), ("resnet50", None)])
def test_maps_of_rows_are_not_turned_round(monkeypatch: pytest.MonkeyPatch, name: str, options: Any) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: asked.append(settings["options"]) or function)
    monkeypatch.setattr(compiled_module, "_compiled", functools.cache(compiled_module._compiled.__wrapped__))
    with torch.device("meta"):
        model = models.build(name)
    with compiled(model):
        pass
    assert asked and all(found == options for found in asked)


def test_branches_of_two_streams_are_compiled_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda block, *given: (block, function.__name__))
    monkeypatch.setattr(compiled_module, "_compiled", functools.cache(compiled_module._compiled.__wrapped__))
    with torch.device("meta"):
        model = models.build("medmamba_t")
    block, x = parts_of(model, "BLOCKS")[0], torch.empty(0)
    with compiled(model):
        found = [getattr(block, name)(x) for name in ("convolve",)]
        assert found == [(block, "convolve")] and "forward" not in vars(block)
    assert not vars(block).keys() & {"convolve"}, "outside they are as before"


@pytest.mark.slow
def test_compiled_blocks_share_code_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, not compiled to machine code, which takes minutes."""
    seen: list[Any] = []
    real = torch.compile

    def traced(function: Any, **settings: Any) -> Any:
        def count(graph: Any, inputs: Any) -> Any:
            seen.append(graph)
            return graph.forward

        return real(function, backend=count, **settings)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(compiled_module, "_compiled", functools.cache(compiled_module._compiled.__wrapped__))
    torch.manual_seed(0)
    model = models.build("resnet50").train()
    assert parts_of(model, "BLOCKS")
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    with compiled(model):
        inside = model(images)
    torch.testing.assert_close(inside, before)
    assert 0 < len(seen) < len(parts_of(model, "BLOCKS")), "blocks of a shape share what was compiled"
    assert all("forward" not in vars(block) for block in parts_of(model, "BLOCKS")), "outside they are as before"


def test_a_compiled_branch_is_dropped_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    drop, x = DropPath(0.25), torch.ones(4000, 2, 2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.manual_seed(0)
    y = drop(x)
    per_image = y.flatten(1)
    assert (per_image == per_image[:, :1]).all() and 0.72 < (per_image[:, 0] > 0).float().mean() < 0.78
    assert y.max().item() == pytest.approx(1 / 0.75)
    assert "keep" not in drop.state_dict(), "checkpoints stay as they were"


def trained(config: TrialConfig, data: PairData) -> tuple[list[EpochResult], Weights, Stepper]:
    fitting = fit(config, data, device=torch.device("cuda"))
    results = list(fitting)
    assert fitting.stepper is not None
    return results, {name: value.cpu() for name, value in fitting.model.state_dict().items()}, fitting.stepper


def assert_the_same(recorded: list[EpochResult], weights: Weights, plain: list[EpochResult], expected: Weights) -> None:
    for one, other in zip(recorded, plain, strict=True):
        assert one.metrics["val/loss"] == pytest.approx(other.metrics["val/loss"], rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_recorded_training_is_the_training(
    tiny_config: Make, tiny_data: PairData, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Over a drop of the rate, and with a last batch of another size."""
    config = tiny_config(optimizer=optimizer, batch_size=8, clip_norm=1.0, precision="fp32")
    recorded, weights, stepper = trained(config, tiny_data)
    assert isinstance(stepper, GraphStepper) and stepper.problem is None and stepper._recorded
    monkeypatch.setenv(SWITCH, "0")
    plain, expected, _ = trained(config, tiny_data)
    assert_the_same(recorded, weights, plain, expected)


@pytest.mark.gpu
@needs_gpu
def test_a_recorded_medmamba_is_the_model(tiny_data: PairData, monkeypatch: pytest.MonkeyPatch) -> None:
    """On streams of its own for branches and for weights' gradients: whoever does not wait for them has other results."""
    monkeypatch.setattr(DropPath, "scale", lambda *_: None)  # which would draw others
    config = TrialConfig(
        model="medmamba_t", pair="synthetic", image_size=64, batch_size=16, epochs=4, precision="fp32", schedule="constant"
    )
    recorded, _, stepper = trained(config, tiny_data)
    assert isinstance(stepper, GraphStepper) and stepper.problem is None and stepper._recorded
    monkeypatch.setenv(SWITCH, "0")
    plain, _, _ = trained(config, tiny_data)
    for one, other in zip(recorded, plain, strict=True):
        assert one.metrics["val/loss"] == pytest.approx(other.metrics["val/loss"], rel=0.02)


class TwoBranches(TinyNet):
    """The first branch takes long: whoever does not wait for it has other results."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.mixed = nn.Parameter(torch.eye(1024) + 0.01 * torch.randn(1024, 1024))
        self.streams: set[int] = set()

    def slow(self, x: torch.Tensor) -> torch.Tensor:
        self.streams.add(torch.cuda.current_stream().cuda_stream)
        weight = self.mixed
        for _ in range(8):
            weight = weight @ self.mixed / 2
        return x * weight.mean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return super().forward(torch.cat(both(self.slow, left, torch.sin, right), -1))


@pytest.mark.gpu
@needs_gpu
def test_two_branches_run_beside_each_other(
    tiny_config: Make, tiny_data: PairData, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TwoBranches] = []

    def build(*_: Any, **__: Any) -> TwoBranches:
        torch.manual_seed(0)
        made.append(TwoBranches())
        return made[-1]

    monkeypatch.setattr(models, "build", build)
    config = tiny_config(batch_size=8, precision="fp32")
    recorded, weights, stepper = trained(config, tiny_data)
    assert isinstance(stepper, GraphStepper) and stepper.problem is None and stepper._recorded
    assert stepper._others[0].cuda_stream in made[0].streams
    monkeypatch.setenv(SWITCH, "0")
    plain, expected, _ = trained(config, tiny_data)
    assert stepper._others[0].cuda_stream not in made[1].streams
    assert_the_same(recorded, weights, plain, expected)


@pytest.mark.gpu
@needs_gpu
def test_what_cannot_be_recorded_is_trained_all_the_same(
    tiny_config: Make, tiny_data: PairData, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asks(TinyNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.sum().item() == x.sum().item()  # waits for the device
            return super().forward(x)

    monkeypatch.setattr(models, "build", lambda *_, **__: Asks(2, 3))
    monkeypatch.setattr(steps, "_broken", None)
    before = torch.cuda.current_stream()
    results, _, stepper = trained(tiny_config(batch_size=8), tiny_data)
    assert len(results) == 4 and isinstance(stepper, GraphStepper)
    assert stepper.problem and not stepper._recorded and broken_recording() == stepper.problem
    assert torch.cuda.current_stream() == before


def test_a_recording_that_breaks_off_leaves_the_stream_as_it_was_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the device's part left out."""
    streams = ["first"]

    class Invalid:
        def capture_end(self) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    class Recording:
        """torch's way into a recording and out of it."""

        def __init__(self, graph: Any, **_: Any) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            streams.append("second")

        def __exit__(self, *_: object) -> None:
            self.graph.capture_end()
            streams.pop()

    def fails(*_: Any) -> Any:
        raise RuntimeError("aten::item asks the device\nand more")

    def switch(stream: str) -> None:
        streams[:] = [stream]

    replaced: dict[str, Any] = {
        "CUDAGraph": Invalid, "graph": Recording, "synchronize": lambda: None, "empty_cache": lambda: None,
        "current_stream": lambda: streams[-1], "set_stream": switch, "current_device": lambda: 0,
        "default_generators": [Mock()],
    }  # fmt: skip
    for name, instead in replaced.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(steps, "_broken", None)
    monkeypatch.setattr(steps, "_side_streams", Mock(return_value=(None, None, None, None)))
    recorder = GraphStepper(TinyNet(2, 3), Mock(), Mock(batch_size=2), None, compiles=False)
    monkeypatch.setattr(recorder, "_step", fails)
    assert recorder._record(Mock(labels=[0, 1]), [(0, 2)], 2) is None
    assert streams == ["first"]
    assert recorder.problem == broken_recording() == "RuntimeError: aten::item asks the device"


@pytest.mark.gpu
@needs_gpu
def test_whole_batches_alone_are_compiled(
    tiny_config: Make, tiny_data: PairData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """49 images in batches of 10: the last nine are computed as they are."""
    compiled_sizes: set[int] = set()
    others: set[int] = set()
    inside: list[torch.nn.Module] = []

    @contextlib.contextmanager
    def compiling(model: torch.nn.Module) -> Iterator[None]:
        inside.append(model)
        yield
        inside.pop()

    class Tells(TinyNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                (compiled_sizes if inside else others).add(len(x))
            return super().forward(x)

    monkeypatch.setattr("medtune.models.compiled.compiled", compiling)
    monkeypatch.setattr(models, "build", lambda *_, **__: Tells(2, 3))
    monkeypatch.setenv(COMPILE, "1")
    trained(tiny_config(batch_size=10), tiny_data)
    assert (compiled_sizes, others) == ({10}, {9})
