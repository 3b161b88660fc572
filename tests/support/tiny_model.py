"""A model of a few weights in a file of its own, as `medtune.models` has them: programs are made of it in seconds."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class Block(nn.Module):
    """(B, C, H, W) -> (B, width, H / 2, W / 2)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Tiny(nn.Module):
    """images (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        widths = (in_channels, 8, 8, 16, 16)
        self.blocks = nn.Sequential(*(Block(*pair) for pair in pairwise(widths)))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


BLOCKS = (Block,)


def tiny(num_classes: int, in_channels: int) -> Tiny:
    return Tiny(num_classes, in_channels)
