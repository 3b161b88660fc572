"""How long a study would take on this machine's CPU, said before it starts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from statistics import mean

import torch
import torch.nn.functional as F

from medtune.config import StudyConfig
from medtune.data import PairData
from medtune.models import build
from medtune.progress import duration


def expected_epochs(config: StudyConfig, epochs: int) -> float:
    """Of a trial of so many epochs, those that it gets on average, when each rung keeps one in `reduction`."""
    marks = (0, *config.rungs(epochs), epochs)
    share, total = 1.0, 0.0
    for start, stop in itertools.pairwise(marks):
        total += share * (stop - start)
        share /= config.reduction
    return total


def seconds_per_image(config: StudyConfig, images: int = 2) -> float:
    """Training time of one image on the CPU, from one step after a first that warms up."""
    trial = config.trial
    model = build(trial.model)
    batch = torch.rand(images, 3, trial.image_size, trial.image_size)
    labels = torch.arange(images) % 2
    for _ in range(2):
        started = time.perf_counter()
        F.cross_entropy(model(batch), labels).backward()
        seconds = time.perf_counter() - started
    return seconds / images


def cpu_study(config: StudyConfig, data: PairData, epochs: Sequence[int]) -> list[str]:
    """Lines that say how long the whole study would take without a GPU, and how to make it smaller.

    `epochs`: of its trials, or the numbers that they choose from.
    """
    per_image = seconds_per_image(config)
    train = min(len(data.train), config.trial.train_limit or len(data.train))
    # Validation passes each image forward alone: about a third of a training step.
    epoch = per_image * (train + len(data.val) / 3)
    total = epoch * mean(expected_epochs(config, one) for one in epochs) * config.trials
    days = f" ({total / 86400:.0f} days)" if total > 2 * 86400 else ""
    return [
        f"no GPU here: one image takes {per_image:.2f} s to train with {config.trial.model}, an epoch about "
        f"{duration(epoch)}, this study about {duration(total)}{days} with its trials one after the other on all cores",
        "  smaller: --preset laptop, or fewer --epochs, --trials, a smaller --image-size, --train-limit",
    ]
