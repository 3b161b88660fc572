"""What the gated norm's kernels are compared with: on a GPU or, as `python -m tests.ops.norm_cases`, by the interpreter."""

from __future__ import annotations

import copy
import functools
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medtune.models import medmamba, vmamba
from medtune.models.recompute import checkpoint_activations
from medtune.ops.gated_norm import gated_norm
from tests.ops.triton_cases import by_kernels, errors, gradients

CASES: dict[str, dict[str, Any]] = {
    "three pieces, tiles one after the other": dict(shape=(2, 5, 7, 96)),
    "odd channels, both halves of wider rows": dict(shape=(1, 3, 5, 37), halves=True),
    "no gate": dict(shape=(2, 3, 3, 40), gated=False),
    "bfloat16, halves of wider rows": dict(shape=(2, 3, 3, 32), halves=True, dtype=torch.bfloat16),
    "a mean a thousand times the deviation": dict(shape=(1, 2, 3, 16), shift=1000.0),
    "a map that lies by columns, twice": dict(shape=(2, 2, 3, 5), columns=True, recomputed=True),
    "gates that overflow": dict(shape=(1, 1, 4, 8), open=200.0),
    "a row of several warps, one channel more than pieces have": dict(shape=(1, 1, 3, 1537)),
    "no rows": dict(shape=(0, 2, 2, 8)),
    "a gradient that is not dense": dict(shape=(2, 3, 4, 8), turned=True),
}
LARGE: dict[str, dict[str, Any]] = {
    f"{side}x{side}, {channels}, {'bfloat16' if dtype == torch.bfloat16 else 'float32'}{', no gate' * (not gated)}": dict(
        shape=(8, side, side, channels), dtype=dtype, gated=gated, halves=gated
    )
    for side, channels in ((56, 96), (28, 192), (14, 384), (7, 768), (56, 128), (7, 1024), (7, 2048))
    for dtype, gated in ((torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False))
}
"""For a GPU."""
BLOCKS = ("medmamba", "vmamba", "compiled", "whole", "whole, recomputed", "whole, depths drawn")
BESIDE = ("branch, bfloat16", "halves of 48", "halves of 70", "halves of 96, bfloat16", "parts")


def compare(name: str, device: str) -> dict[str, float]:
    """The relative errors of one case."""
    if name.startswith("whole"):
        return whole(name)
    if name.startswith("halves"):
        return halves(device, int(name[10:12]), torch.bfloat16 if "bfloat16" in name else torch.float32)
    if name in BESIDE:
        return branch(device) if name.startswith("branch") else parts(device)
    return block(name) if name in BLOCKS else norm(device, **(CASES | LARGE)[name])


def norm(
    device: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, gated: bool = True, halves: bool = False,
    columns: bool = False, recomputed: bool = False, turned: bool = False, shift: float = 0.0, open: float = 1.0,
) -> dict[str, float]:  # fmt: skip
    """Relative errors of the result and all gradients beside PyTorch's operators in float64.

    halves: y and z side by side in memory; columns: both transposed; recomputed: under activation checkpointing;
    turned: the gradient's channels do not lie side by side.
    """
    g = torch.Generator().manual_seed(shape[-1])
    y, z, weight, bias = (torch.randn(s, generator=g) for s in (shape, shape, shape[-1:], shape[-1:]))
    values = [v.to(dtype) for v in (torch.cat((y + shift, open * z), dim=-1), 1 + weight / 2, bias)]

    def function(both: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, z = both.chunk(2, dim=-1)
        if not halves:
            y, z = y.contiguous(), z.contiguous()
        if columns:
            y, z = (v.transpose(1, 2).contiguous().transpose(1, 2) for v in (y, z))
        y = gated_norm(y, z if gated else None, weight, bias, 1e-5)
        return y.transpose(1, 3) if turned else y

    ours = functools.partial(checkpoint, function, use_reentrant=False) if recomputed else function
    exact = gradients(function, values, torch.float64, "cpu")
    found = by_kernels(lambda: gradients(ours, values, dtype, device))
    assert found[0].dtype == dtype and (turned or found[0].is_contiguous())
    return errors(("result", "y and z", "weight", "bias"), found, exact)


def block(name: str) -> dict[str, float]:
    """Errors of a model's scan, with its norm, in the kernels beside PyTorch in float64; or of it compiled beside itself."""
    torch.manual_seed(0)
    module = vmamba.SS2D(2, 2) if name == "vmamba" else medmamba.SS2D(2, states=1)
    names, parameters = zip(*module.named_parameters(), strict=True)
    values = [torch.randn(1, 2, 3, 2), *(torch.randn_like(p) * 0.5 for p in parameters)]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    if name == "compiled":
        whole = torch.compile(function, fullgraph=True, backend="aot_eager")
        found, plain = by_kernels(lambda: [gradients(f, values, torch.float32, "cpu") for f in (whole, function)])
        exact = [v.double() for v in plain]
    else:
        found = by_kernels(lambda: gradients(function, values, torch.float32, "cpu"))
        exact = gradients(function, values, torch.float64, "cpu")
    return errors(("result", "x", *names), found, exact)


def whole(name: str) -> dict[str, float]:
    """Errors of a small MedMamba, a block of each of two sizes: result and gradients.

    Also of computing blocks again; and with stochastic depth, which draws the same for both.
    """
    torch.manual_seed(0)
    model = medmamba.MedMamba((1, 1), 4, in_channels=1, drop_path=0.5 if "drawn" in name else 0.0)
    for part in model.modules():
        if isinstance(part, medmamba.SSConvSSM):
            part.self_attention = medmamba.SS2D(part.ln_1.weight.numel(), states=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    images = torch.randn(2, 1, 16, 8)

    def results(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        model = model.to(dtype)
        given = images.to(dtype, copy=True).requires_grad_()
        torch.manual_seed(1)
        y = model(given)
        (y * torch.tensor([1.0, -2.0])).sum().backward()
        found = {"result": y, "images": given.grad, **{name: p.grad for name, p in model.named_parameters()}}
        return {name: v.detach() for name, v in found.items() if v is not None}

    ours = copy.deepcopy(model)
    if "recomputed" in name:
        checkpoint_activations(ours)
    found, exact = by_kernels(lambda: results(ours, torch.float32)), results(model, torch.float64)
    assert found.keys() == exact.keys()
    names = [name for name, v in exact.items() if v.abs().max() > 1e-12]  # but biases that a norm takes away again
    return errors(tuple(names), [found[name] for name in names], [exact[name] for name in names])


def branch(device: str) -> dict[str, float]:
    """Errors of a block's scan branch in bfloat16, result and gradients, beside PyTorch's operators in float64."""
    from medtune.ops.triton_branch import triton_scan_branch

    torch.manual_seed(0)
    block = medmamba.SSConvSSM(16, drop_path=0.0)
    block.self_attention = medmamba.SS2D(8, states=2)
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.data = parameter.to(torch.bfloat16).float()
    x = torch.randn(2, 4, 5, 8).to(torch.bfloat16)
    slope = torch.randn(2, 4, 5, 8).to(torch.bfloat16)

    def results(block: medmamba.SSConvSSM, x: Tensor, kernels: bool) -> dict[str, Tensor]:
        x = x.requires_grad_()
        if kernels:
            y = triton_scan_branch(x, block.ready(len(x), torch.bfloat16), medmamba.EPS)
        else:
            y = block.self_attention(block.ln_1(x))
        y.backward(slope.to(y))
        found = {"result": y, "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
        return {name: v.detach().cpu() for name, v in found.items() if v is not None}

    exact = results(copy.deepcopy(block).double(), x.double(), kernels=False)
    found = by_kernels(lambda: results(block.to(device), x.detach().to(device), kernels=True))
    assert found.keys() == exact.keys()
    return errors(tuple(found), list(found.values()), [exact[name] for name in found])


def halves(device: str, channels: int, dtype: torch.dtype) -> dict[str, float]:
    """Errors of what stands between two blocks, result and gradients."""
    torch.manual_seed(0)
    shapes = (3, 5, 7, 2 * channels), (3, 5, 7, channels), (3, 5, 7, channels)
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    scale = torch.tensor([0.0, 2.0, 1.0])

    def run(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            x = x + torch.stack((left, right * scale[:, None, None, None]), -1).flatten(-2)
            return x * torch.cat(x.chunk(2, -1)[::-1], -1)
        from medtune.ops.triton_halves import triton_halves, triton_join

        x, one, two = triton_halves(triton_join(x, left, right, scale.to(x.device)))
        return x * torch.cat((two, one), -1)

    exact = gradients(run, values, torch.float64, "cpu")
    return errors(("result", "x", "left", "right"), gradients(run, values, dtype, device), exact)


def parts(device: str) -> dict[str, float]:
    """Errors of sums of more parts than a program takes at once."""
    from medtune.ops.parts import add_parts

    given = torch.randn(3, 150, 5, 9, generator=torch.Generator().manual_seed(0))
    return errors(("sums",), [add_parts(given.to(device)).cpu()], [given.double().sum(1)])


def main() -> None:
    from medtune.ops import triton_norm

    triton_norm.FORWARD_PROGRAMS = triton_norm.BACKWARD_PROGRAMS = 2  # more than a tile for each
    torch.set_num_threads(1)
    print(json.dumps({name: compare(name, "cpu") for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
