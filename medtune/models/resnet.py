"""ResNet-50 (He et al. 2015, arXiv:1512.03385), timm's implementation, no pre-training.

Source:     timm `resnet50` (Apache-2.0); parameter names are torchvision's
Deviations: none
"""

from __future__ import annotations

from timm.models.resnet import Bottleneck
from timm.models.resnet import resnet50 as timm_resnet50
from torch import nn

BLOCKS = (Bottleneck,)
"""What activation checkpointing computes again."""
CHANNELS_LAST = BLOCKS
"""Convolutions are most of it: `medtune.models.layout`."""


def resnet50(num_classes: int, in_channels: int) -> nn.Module:
    """images (B, C, H, W) -> logits (B, num_classes)."""
    return timm_resnet50(pretrained=False, num_classes=num_classes, in_chans=in_channels)
