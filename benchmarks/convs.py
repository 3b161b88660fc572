"""Convolutions of tiny maps and short sequences on one CPU core: ours and PyTorch's, forward and backward.

Run:     python benchmarks/convs.py
Time:    of the processor, so that what else the machine does moves it little; the best of several runs
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtune.ops.causal_conv import causal_conv1d
from medtune.ops.conv import Conv1x1, Conv3x3

IMAGES = 32


def main() -> None:
    torch.set_num_threads(1)
    for channels, side in ((384, 1), (192, 2)):
        compare(f"3x3, {channels} channels, {side}x{side}", Conv3x3(channels, channels), maps(channels, side))
    for channels, side in ((768, 1), (384, 2)):
        conv = Conv3x3(channels, channels, groups=channels)
        compare(f"3x3 depth-wise, {channels} channels, {side}x{side}", conv, maps(channels, side))
    conv = Conv3x3(384, 768, stride=2)
    compare("3x3 stride 2, 384 to 768 channels, 2x2", conv, maps(384, 2))
    for channels, side in ((768, 1), (384, 2)):
        wider = Conv1x1(channels, 3 * channels)
        compare(f"1x1, {channels} to {3 * channels} channels, {side}x{side}", wider, maps(channels, side))
    for batch, length in ((32, 5), (8, 197)):
        compare_causal(batch, length)


def maps(channels: int, side: int) -> Tensor:
    """Channels last in memory, as MedMamba and VMamba have them."""
    return torch.randn(IMAGES, side, side, channels).permute(0, 3, 1, 2).requires_grad_()


def compare(what: str, conv: nn.Conv2d, x: Tensor) -> None:
    say(what, seconds(lambda: conv(x)), seconds(lambda: nn.Conv2d.forward(conv, x)))


def compare_causal(batch: int, length: int, channels: int = 384, taps: int = 4) -> None:
    x = torch.randn(batch, length, channels, requires_grad=True)
    weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((channels, taps), (channels,)))

    def theirs() -> Tensor:
        y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=taps - 1, groups=channels)
        return y[..., :length].transpose(1, 2) * 1

    def ours() -> Tensor:
        return causal_conv1d(x.transpose(1, 2), weight, bias).transpose(1, 2) * 1

    say(f"causal, {channels} channels, {batch} sequences of {length}", seconds(ours), seconds(theirs))


def seconds(forward: Callable[[], Tensor], runs: int = 15) -> float:
    found = []
    for _ in range(runs):
        started = time.process_time()
        y = forward()
        y.backward(torch.ones_like(y))
        found.append(time.process_time() - started)
    return min(found)


def say(what: str, ours: float, theirs: float) -> None:
    print(f"{what:<45} ours {ours * 1e3:6.2f} ms, PyTorch's {theirs * 1e3:6.2f} ms", flush=True)


if __name__ == "__main__":
    main()
