"""What the Triton kernels are compared with, on a GPU or, as `python -m tests.ops.triton_cases`, by Triton's interpreter.

The interpreter must be asked for before Triton is imported, so tests run this in a process of its own.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from medtune.models import layers
from medtune.ops import engines
from tests.ops.test_scan import inputs, loop

GIVEN = ("u", "delta", "A", "B", "C", "D", "bias")
MAPPED = ("y", "x", "x_proj", "dt_proj", "dt_bias", "a_log", "skip")
SEQUENCES: dict[str, dict[str, Any]] = {
    "odd channels in groups, an odd length": dict(batch=1, channels=6, groups=2, states=2, length=5),
    "two blocks of channels": dict(batch=1, channels=35, groups=1, states=2, length=3),
    "no softplus, bias or D": dict(batch=1, channels=4, groups=1, states=2, length=4, plain=True),
    "bfloat16": dict(batch=1, channels=4, groups=1, states=1, length=6, dtype=torch.bfloat16),
    "one position": dict(batch=1, channels=4, groups=2, states=2, length=1),
    "steps so large that nothing is left": dict(batch=1, channels=4, groups=1, states=2, length=6, step=3.0, shift=300.0),
    "steps so small that nothing decays": dict(batch=1, channels=4, groups=1, states=2, length=6, shift=-20.0),
    "images, groups and chunks": dict(batch=2, channels=6, groups=2, states=3, length=9),
}
MAPS: dict[str, dict[str, Any]] = {
    "a map twice": dict(images=1, height=3, width=2, channels=3, states=1, recomputed=True),
    "maps": dict(images=2, height=3, width=5, channels=5),
    "two blocks of a map's channels": dict(images=1, height=2, width=3, channels=33, states=1),
    "maps in bfloat16": dict(images=2, height=4, width=3, channels=4, dtype=torch.bfloat16),
}
CONVOLVED: dict[str, dict[str, Any]] = {
    "convolved maps, whose gradient comes turned about": dict(
        images=2, height=4, width=3, channels=33, turned=True, recomputed=True
    ),
    "no convolved maps": dict(images=0, height=2, width=3, channels=4),
    "convolved maps in bfloat16, without bias": dict(
        images=1, height=2, width=4, channels=32, dtype=torch.bfloat16, bias=False
    ),
    "one convolved position": dict(images=3, height=1, width=1, channels=7),
    "convolved maps in float16": dict(images=1, height=2, width=3, channels=4, dtype=torch.float16),
    "convolved maps": dict(images=3, height=7, width=6, channels=64),
}
FEW = (
    "odd channels in groups, an odd length", "two blocks of channels", "no softplus, bias or D", "bfloat16", "a map twice",
    "convolved maps, whose gradient comes turned about", "convolved maps in bfloat16, without bias", "no convolved maps",
)  # fmt: skip
"""What every run of the tests can afford of the interpreter."""
LARGE_CONVOLVED: dict[str, dict[str, Any]] = {
    "MedMamba's first stage, convolved": dict(images=3, height=56, width=56, channels=96),
    "MedMamba's first stage, convolved in bfloat16": dict(
        images=3, height=56, width=56, channels=96, dtype=torch.bfloat16
    ),
    "its third, convolved in bfloat16": dict(images=5, height=14, width=14, channels=384, dtype=torch.bfloat16),
    "its last, convolved": dict(images=5, height=7, width=7, channels=768),
}
LARGE: dict[str, dict[str, Any]] = {
    "MedMamba's first stage": dict(images=2, height=56, width=56, channels=96, states=16),
    "MedMamba's first stage in bfloat16": dict(images=2, height=56, width=56, channels=96, states=16, dtype=torch.bfloat16),
    "its last": dict(images=2, height=7, width=7, channels=768, states=16),
    "many states": dict(images=1, height=5, width=33, channels=40, states=64),
}
"""For a GPU."""


def compare(name: str, device: str) -> dict[str, float]:
    """The relative errors of one case."""
    if name == "compiled":
        return compiled()
    if name in CONVOLVED | LARGE_CONVOLVED:
        return convolved(device, **(CONVOLVED | LARGE_CONVOLVED)[name])
    return sequence(device, **SEQUENCES[name]) if name in SEQUENCES else grid(device, **(MAPS | LARGE)[name])


def allowed(name: str) -> float:
    """float32's bar; in bfloat16 what is given, multiplied and taken is rounded to 8 bits, some of it several times."""
    most = 0.05 if name.startswith("branch") else 0.02  # gradients of steps are rounded at five places
    return most if "float16" in name else 1e-4


def sequence(device: str, plain: bool = False, dtype: torch.dtype = torch.float32, **shape: Any) -> dict[str, float]:
    """Relative errors of y and every gradient beside the float64 loop."""
    from medtune.ops.scan import _by_triton

    values = [v.detach().to(dtype) for v in inputs(**shape)]
    if plain:
        values = [values[0], values[1].abs(), *values[2:5]]
    exact = gradients(lambda *v: loop(*v, delta_softplus=not plain), values, torch.float64, "cpu")
    D_and_bias = [None, None] if plain else []
    ours = gradients(lambda *v: _by_triton(*v, *D_and_bias, not plain), values, dtype, device)
    return errors(("y", *GIVEN[: len(values)]), ours, exact)


def grid(
    device: str, images: int, height: int, width: int, channels: int, dtype: torch.dtype = torch.float32, states: int = 2,
    recomputed: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Relative errors of `scan_map` in the kernels beside the same by copied readings in PyTorch, in float64.

    recomputed: under activation checkpointing.
    """
    g = torch.Generator().manual_seed(height)
    rank, readings = 2, layers.DIRECTIONS
    shapes = [
        (images, height, width, channels), (readings, rank + 2 * states, channels), (readings, channels, rank),
        (readings, channels), (readings * channels, states), (readings * channels,),
    ]  # fmt: skip
    x, x_proj, *rest = (torch.randn(shape, generator=g) for shape in shapes)
    values = [v.to(dtype) for v in (x, x_proj * channels**-0.5, *rest)]
    exact = gradients(layers.scan_map, values, torch.float64, "cpu")
    function = functools.partial(checkpoint, layers.scan_map, use_reentrant=False) if recomputed else layers.scan_map
    return errors(MAPPED, by_kernels(lambda: gradients(function, values, dtype, device)), exact)


def convolved(
    device: str, images: int, height: int, width: int, channels: int, dtype: torch.dtype = torch.float32,
    bias: bool = True, turned: bool = False, recomputed: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Relative errors of a depth-wise convolution of half of a row's channels, and its SiLU, beside PyTorch's in float64.

    turned: the gradient comes transposed; recomputed: under activation checkpointing.
    """
    from medtune.ops.triton_depthwise import triton_depthwise_silu

    g = torch.Generator().manual_seed(height)
    shapes = [(images, height, width, 2 * channels), (channels, 1, 3, 3), *([(channels,)] if bias else [])]
    values = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]

    def by(function: Any) -> Any:
        def run(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = function(rows.chunk(2, dim=-1)[1], weight, bias)
            return y.transpose(1, 2) if turned else y

        return run

    def exactly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.silu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=channels)).permute(0, 2, 3, 1)

    function = by(triton_depthwise_silu)
    function = functools.partial(checkpoint, function, use_reentrant=False) if recomputed else function
    ours, exact = gradients(function, values, dtype, device), gradients(by(exactly), values, torch.float64, "cpu")
    return errors(("y", "x", "weight", "bias")[: 1 + len(values)], ours, exact)


def compiled() -> dict[str, float]:
    """Errors of MedMamba's branch in the kernels, under torch.compile, whole, beside itself in PyTorch in float64."""
    from medtune.models.medmamba import SS2D

    branch = SS2D(2, states=1)
    names, parameters = zip(*branch.named_parameters(), strict=True)
    g = torch.Generator().manual_seed(1)
    values = [torch.randn(1, 3, 2, 2, generator=g), *(torch.randn(v.shape, generator=g) for v in parameters)]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(branch, dict(zip(names, parameters, strict=True)), x)

    exact = gradients(run, values, torch.float64, "cpu")
    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    return errors(("y", "x", *names), by_kernels(lambda: gradients(whole, values, torch.float32, "cpu")), exact)


def by_kernels(function: Any) -> Any:
    """What a function returns where each of our kernels runs, float64 apart."""
    chosen, engines.scan_engine = engines.scan_engine, lambda device: "triton"
    try:
        return function()
    finally:
        engines.scan_engine = chosen


def gradients(function: Any, values: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    values = [v.to(device, dtype).requires_grad_() for v in values]
    y = function(*values)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(device, y.dtype)
    found = [y, *torch.autograd.grad(y, values, weight)]
    if device == "cuda":  # once more, to the bit
        again = torch.autograd.grad(function(*values), values, weight)
        assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True)), "not the same bits twice"
    return [v.detach().cpu() for v in found]


def errors(names: tuple[str, ...], ours: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    if not exact[0].numel():
        assert not any(v.any() for v in ours), "gradients of no images are zero"
        return {}
    pairs = dict(zip(names, zip(ours, exact, strict=True), strict=True))
    return {n: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for n, (a, b) in pairs.items()}


def for_the_interpreter() -> None:
    """Several chunks of short sequences, several tiles of small maps: it needs milliseconds for each operation."""
    from medtune.ops import triton_depthwise, triton_scan

    triton_scan.CHUNK = 4
    triton_depthwise.TILE = triton_depthwise.BACKWARD_TILE = (3, 2)
    triton_depthwise.AHEAD, triton_depthwise.WARPS, triton_depthwise.PROGRAMS = 2, 1, 2
    torch.set_num_threads(1)


def main() -> None:
    for_the_interpreter()
    print(json.dumps({name: compare(name, "cpu") for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
