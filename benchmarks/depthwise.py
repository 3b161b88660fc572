"""The depth-wise 3x3 convolution with its SiLU on a GPU: our kernels beside PyTorch, as it is and compiled.

Run:     python -m benchmarks.depthwise            (--try 7,4,4,4,3,2,1024: other sizes of the kernels, see SIZES)
Shapes:  the four stages of MedMamba-s at 224 px, `--batch` images in bfloat16, half of a row's channels each
Time:    microseconds, medians of CUDA events, forward + backward, launches hidden behind a pause; ours also kernel by kernel
Error:   of y and the gradients, the largest beside PyTorch in float32, relative to the largest value
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.scan import STAGES, spans
from medtune.ops import triton_depthwise

SIZES = "rows and columns forward, rows and columns backward, lines ahead, warps, programs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--try", dest="others", nargs="+", default=[], help=SIZES, type=numbers)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {options.batch}, bfloat16, microseconds")
    heads = "".join(f"{f'{side}x{side}, {2 * width}':>18}" for width, side, _ in STAGES)
    print(f"{'forward + backward':<40}{heads}", flush=True)
    maps = [inputs(options.batch, 2 * width, side) for width, side, _ in STAGES]

    def line(name: str, cell: Callable[..., str]) -> None:
        print(f"{name:<40}" + "".join(f"{cell(*values):>18}" for values in maps), flush=True)

    line("PyTorch", lambda *v: whole(theirs, v, options.repeats))
    line("PyTorch, compiled", lambda *v: whole(torch.compile(theirs), v, options.repeats))
    for sizes in [None, *options.others]:
        if sizes:
            set_sizes(sizes)
        line(f"ours {sizes or ''}", lambda *v: whole(triton_depthwise.triton_depthwise_silu, v, options.repeats))
        line("  forward, backward, dx of it", lambda *v: kernels(v, options.repeats))
        line("  error", lambda *v: f"{error(v):.1e}")


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def set_sizes(sizes: Sequence[int]) -> None:
    rows, columns, back_rows, back_columns, ahead, warps, programs = sizes
    triton_depthwise.TILE, triton_depthwise.BACKWARD_TILE = (rows, columns), (back_rows, back_columns)
    triton_depthwise.AHEAD, triton_depthwise.WARPS, triton_depthwise.PROGRAMS = ahead, warps, programs


def inputs(batch: int, channels: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight and bias, to be differentiated, and dy."""
    g = torch.Generator("cuda").manual_seed(0)
    rows, dy = (torch.randn(batch, side, side, n, generator=g, device="cuda") for n in (2 * channels, channels))
    weight = torch.randn(channels, 1, 3, 3, generator=g, device="cuda")
    bias = torch.randn(channels, generator=g, device="cuda")
    x = rows.bfloat16()[..., :channels]
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy.bfloat16()


def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0])
    return F.silu(y).permute(0, 2, 3, 1)


def whole(function: Callable[..., Tensor], values: Sequence[Tensor], repeats: int) -> str:
    *leaves, dy = values
    there, back = microseconds(repeats, lambda: function(*leaves), lambda y: torch.autograd.grad(y, leaves, dy))
    return f"{there:.1f} + {back:.1f}"


def kernels(values: Sequence[Tensor], repeats: int) -> str:
    """What a CUDA graph would run of ours, without what is around it."""
    x, weight, bias, dy = (v.detach() for v in values)
    taps, dx = weight.flatten(1).mT.contiguous(), torch.empty_like(dy)
    operators = torch.ops.medtune
    there, back = microseconds(
        repeats, lambda: operators.triton_depthwise(x, taps, bias),
        lambda y: operators.triton_depthwise_backward(x, taps, bias, dy),
    )  # fmt: skip
    _, last = microseconds(
        repeats, lambda: dx, lambda dx: triton_depthwise._convolve(dy, taps, None, dx, back=True)
    )  # fmt: skip
    return f"{there:.1f} {back:.1f} {last:.1f}"


def error(values: Sequence[Tensor]) -> float:
    *leaves, dy = values
    x, weight, bias = exact = [v.detach().float().requires_grad_() for v in leaves]
    y = F.silu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=dy.shape[3])).permute(0, 2, 3, 1)
    ours = triton_depthwise.triton_depthwise_silu(*leaves)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, leaves, dy)), (y, *torch.autograd.grad(y, exact, dy.float())), strict=True
    )
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def microseconds(repeats: int, forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> tuple[float, float]:
    there, back = spans(forward, backward, repeats)
    return 1000 * there, 1000 * back


if __name__ == "__main__":
    main()
