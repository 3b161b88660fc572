"""What the Triton kernels are compared with, on a GPU or, as `python -m tests.ops.triton_cases`, by Triton's interpreter.

The interpreter must be asked for before Triton is imported, so tests run this in a process of its own.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medtune.models import layers
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
    "maps in bfloat16": dict(images=2, height=4, width=3, channels=4, dtype=torch.bfloat16),
}
FEW = (
    "odd channels in groups, an odd length", "two blocks of channels", "no softplus, bias or D", "bfloat16", "a map twice",
)  # fmt: skip
"""What every run of the tests can afford of the interpreter."""
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
    return sequence(device, **SEQUENCES[name]) if name in SEQUENCES else grid(device, **(MAPS | LARGE)[name])


def allowed(name: str) -> float:
    """float32's bar; in bfloat16 what is given, multiplied and taken is rounded to 8 bits, some of it several times."""
    return 0.02 if "bfloat16" in name else 1e-4


def sequence(device: str, plain: bool = False, dtype: torch.dtype = torch.float32, **shape: Any) -> dict[str, float]:
    """Relative errors of y and every gradient beside the float64 loop."""
    from medtune.ops.scan import _by_triton

    values = [v.detach().to(dtype) for v in inputs(**shape)]
    if plain:
        values = [values[0], values[1].abs(), *values[2:5]]
    exact = gradients(lambda *v: loop(*v, delta_softplus=not plain), values, torch.float64, "cpu")
    D_and_bias = [None, None] if plain else []
    ours = gradients(lambda *v: _by_triton(*v, *D_and_bias, not plain), values, dtype, device)
    return errors(("y", *GIVEN), ours, exact)


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
    chosen, layers.in_kernels = layers.in_kernels, lambda x: True
    try:
        ours = gradients(function, values, dtype, device)
    finally:
        layers.in_kernels = chosen
    return errors(MAPPED, ours, exact)


def compiled() -> dict[str, float]:
    """Errors of `scan_map` under torch.compile, whole, beside itself."""
    shapes = [(1, 3, 2, 3), (4, 4, 3), (4, 3, 2), (4, 3), (12, 1), (12,)]
    values = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    chosen, layers.in_kernels = layers.in_kernels, lambda x: True
    try:
        function = torch.compile(layers.scan_map, fullgraph=True, backend="aot_eager")
        eager, whole = (gradients(f, values, torch.float32, "cpu") for f in (layers.scan_map, function))
    finally:
        layers.in_kernels = chosen
    return errors(MAPPED, whole, [v.double() for v in eager])


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
    pairs = dict(zip(names, zip(ours, exact, strict=True), strict=False))
    return {n: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for n, (a, b) in pairs.items()}


def main() -> None:
    from medtune.ops import triton_scan

    triton_scan.CHUNK = 4  # several chunks of short sequences: the interpreter needs milliseconds for each operation
    torch.set_num_threads(1)
    print(json.dumps({name: compare(name, "cpu") for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
