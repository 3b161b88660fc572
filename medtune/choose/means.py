"""With what finalists are trained: flags of the command, as the study's record holds none of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medtune.config import WandbMode


@dataclass(frozen=True, kw_only=True)
class Means:
    """Machines, data folders and W&B of the stage."""

    concurrent: int | None = None
    """Trainings at a time; none: as many as the machines hold."""
    cpus_per_trial: int = 1
    """CPU cores each process of a training computes with."""
    gpus_per_trial: float | None = None
    """GPUs a training reserves, several for one process each; none: one where there is a GPU, else 0."""
    share_gpus: bool = False
    """Let small trainings have a GPU together, each its part by what was measured of its need."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints of a training; 0: after every epoch."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less GPU memory, the same figures, more time."""
    storage_patience: float = 300.0
    """Seconds to wait for storage that is full, read-only or gone, before the stage stops."""
    data_dir: Path | None = None
    """Folder with the data files; default: $MEDTUNE_DATA, then a user cache folder."""
    external_dir: Path | None = None
    """Folder in the external set's layout; default: $MEDTUNE_EXTERNAL_DIR, then the data folder."""
    wandb: WandbMode = "auto"
    """auto: upload where there is a key, else offline; offline: never upload; off: no W&B."""
    wandb_project: str = "medtune"
    """W&B project."""
