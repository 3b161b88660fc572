"""The report's recipe written plainly, for benchmarks to be held against: float32, PIL images through a DataLoader, and the
scan's four directions as copies. With mamba-ssm's kernel where it is installed, else with PyTorch's operations."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from medtune import models
from medtune.data.pair import Split


class PilImages(Dataset[tuple[Tensor, int]]):
    """Grey images, as torchvision's transforms take them one by one."""

    def __init__(self, split: Split, size: int, train: bool) -> None:
        from torchvision import transforms

        changes = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        steps = [*(changes if train else [transforms.Resize((size, size))]), transforms.ToTensor()]
        self.change = transforms.Compose([*steps, transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
        self.images = np.ascontiguousarray(split.images[:, 0])
        self.labels = split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.change(Image.fromarray(self.images[index]).convert("RGB")), int(self.labels[index])


def loader(split: Split, size: int, batch: int, train: bool) -> DataLoader[Any]:
    """With as many workers as the report's scripts ask for: the cores, eight at most."""
    workers = min(os.cpu_count() or 1, 8)
    pinned = torch.cuda.is_available()
    return DataLoader(
        PilImages(split, size, train), batch, shuffle=train, num_workers=workers, pin_memory=pinned, drop_last=train
    )


def again_and_again(batches: DataLoader[Any]) -> Iterator[Any]:
    """Batches without an end."""
    while True:
        yield from batches


def train(model: str, split: Split, size: int, batch: int, device: torch.device, seconds: float) -> dict[str, float]:
    """Train for about so long after a few steps to warm up.

    Returns images a second, peak memory in GiB, and milliseconds a step of its parts.
    """
    torch.manual_seed(0)
    net: nn.Module = models.build(model).to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    loss_of = nn.CrossEntropyLoss()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    batches = again_and_again(loader(split, size, batch, train=True))
    parts = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)
    steps, started = 0, time.perf_counter()
    for step in range(100000):
        if step == 2:  # libraries have chosen their ways, and the workers are there
            steps, started = 0, time.perf_counter()
            parts = dict.fromkeys(parts, 0.0)
        marks = [time.perf_counter()]
        images, labels = next(batches)
        images, labels = images.to(device), labels.to(device)
        wait()
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        loss = loss_of(net(images), labels)
        wait()
        marks.append(time.perf_counter())
        loss.backward()
        wait()
        marks.append(time.perf_counter())
        optimizer.step()
        loss.item()
        marks.append(time.perf_counter())
        for name, begun, ended in zip(parts, marks, marks[1:], strict=False):
            parts[name] += 1000 * (ended - begun)
        steps += 1
        if step >= 3 and time.perf_counter() - started > seconds:
            break
    taken = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return {"images/s": steps * batch / taken, "GiB": peak, **{name: ms / steps for name, ms in parts.items()}}


@torch.no_grad()
def evaluate(model: str, split: Split, size: int, batch: int, device: torch.device) -> float:
    """Images a second in eval mode, the workers' start not counted."""
    net = models.build(model).to(device).eval()
    batches = iter(loader(split, size, batch, train=False))
    net(next(batches)[0].to(device)).argmax(1).cpu()
    started, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(net(images.to(device)).argmax(1).cpu())
    return count / (time.perf_counter() - started)
