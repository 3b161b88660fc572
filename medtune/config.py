"""What a trial and a study are made of: frozen, checked when made, strict about names.

`TrialConfig` is one configuration being trained; the search space overrides some of its fields per trial.
`StudyConfig` is one sweep. Presets are nothing but other defaults.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from medtune.errors import ConfigError, unknown

Optimizer = Literal["adam", "adamw", "sgd"]
Precision = Literal["auto", "bf16", "fp32"]
Schedule = Literal["milestones", "constant"]
Imbalance = Literal["none", "weighted", "balanced"]
Selection = Literal[
    "val/loss", "val/oa", "val/auc", "val/sensitivity", "val/specificity", "val/f1", "val_shift/loss", "val_shift/auc"
]  # fmt: skip
Preset = Literal["full", "laptop"]
WandbMode = Literal["auto", "offline", "off"]


def _require(ok: bool, field_name: str, rule: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{field_name} must be {rule}, got {value!r}")


def _require_number(config: object, names: tuple[str, ...], *, whole: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        kind = int if whole else (int, float)
        ok = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        _require(ok, name, "a whole number" if whole else "a finite number", value)


def _require_choices(config: object, **choices: Any) -> None:
    for name, literal in choices.items():
        value = getattr(config, name)
        if value not in get_args(literal):
            raise ConfigError(unknown(name, str(value), get_args(literal)))


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """One configuration to train. The defaults are the report's recipe."""

    model: str = "medmamba_s"
    """Architecture; `medtune.models.available()` lists the names."""
    pair: str = "pneumoniamnist-cpn"
    """Data pair: what is trained on and what it is tested on from outside."""
    native_size: Literal[28, 64, 128, 224] = 28
    """Side in px of the training set's own files."""
    image_size: int = 224
    """Side in px that images are brought to for the model."""
    epochs: int = 150
    """Passes over the training set."""
    batch_size: int = 64
    """Images per optimizer step."""
    optimizer: Optimizer = "adam"
    """Optimizer."""
    lr: float = 1e-3
    """Learning rate before the first milestone."""
    momentum: float = 0.0
    """Momentum of SGD; the other optimizers ignore it."""
    weight_decay: float = 0.0
    """L2 penalty (adam, sgd) or decoupled decay (adamw)."""
    milestones: tuple[float, ...] = (1 / 3, 1 / 2)
    """Where the learning rate is multiplied by gamma, as fractions of the epochs, rising."""
    gamma: float = 0.1
    """Factor on the learning rate at each milestone."""
    schedule: Schedule = "milestones"
    """milestones: the rate drops at each; constant: it never does, as when the report's scripts ran."""
    clip_norm: float | None = None
    """Gradients are scaled down to this norm where they are longer; none: never."""
    imbalance: Imbalance = "none"
    """What is done about unequal classes: nothing, a loss weighted against class size, or batches drawn evenly."""
    augmentation: float = 0.0
    """0: the report's crops and mirrors; up to 1: also contrast, brightness, blur and resolution changes, that strong."""
    pretrained: str | None = None
    """Weights to start from: a file in the published layout, or `timm` (resnet50 alone); none: random ones."""
    patch_momentum: bool = False
    """MedViT's patch momentum changer: in training, images exchange their features' mean and spread."""
    selection: Selection = "val/loss"
    """Metric that picks a trial's best epoch, and that the search optimises; val_shift: val under simulated shifts."""
    precision: Precision = "auto"
    """bf16 autocast or fp32; auto is bf16 on GPUs of compute capability 8 and above."""
    micro_batch: int | None = None
    """Most images a device computes at once, their gradients added up to the batch's; none: the batch, halved while it
    does not fit into the device's memory."""
    activation_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them: less memory, slower."""
    train_limit: int | None = None
    """Train on this many images, as many of each class as there are to be had; none: all."""
    external_limit: int | None = None
    """Test on this many external images, a fixed stratified choice; none: all."""
    resamples: int = 1000
    """Bootstrap resamples behind the 95 % intervals."""
    checkpoint_seconds: float = 30.0
    """At least this long between checkpoints; rungs and the last epoch always have one."""
    seed: int = 0
    """The study's one seed: of the search, and, the trial's number added, of weights, data order and augmentation."""

    def __post_init__(self) -> None:
        from medtune.data.registry import available_pairs, why_not
        from medtune.models import available, has_patch_momentum

        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.pretrained not in (None, "timm"):
            # A trial's process has another working directory.
            object.__setattr__(self, "pretrained", str(Path(self.pretrained).expanduser().absolute()))
        _require_number(self, ("image_size", "epochs", "batch_size", "resamples", "seed"), whole=True)
        _require_number(self, ("lr", "momentum", "weight_decay", "gamma", "augmentation", "checkpoint_seconds"))
        _require_choices(self, optimizer=Optimizer, selection=Selection, precision=Precision)
        _require_choices(self, schedule=Schedule, imbalance=Imbalance)
        if self.model not in available():
            raise ConfigError(unknown("model", self.model, available()))
        if self.pair not in available_pairs():
            raise ConfigError(why_not(self.pair))
        if self.patch_momentum and not has_patch_momentum(self.model):
            raise ConfigError(f"patch_momentum is for MedViT alone, got model {self.model!r}: leave it out")
        _require(self.native_size in (28, 64, 128, 224), "native_size", "one of 28, 64, 128, 224", self.native_size)
        _require(self.image_size >= 28, "image_size", "at least 28", self.image_size)
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.batch_size >= 2, "batch_size", "at least 2 (BatchNorm needs two images)", self.batch_size)
        _require(0 < self.lr <= 1, "lr", "in (0, 1]", self.lr)
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(0 < self.gamma <= 1, "gamma", "in (0, 1]", self.gamma)
        _require(self.resamples >= 0, "resamples", "at least 0", self.resamples)
        _require(self.checkpoint_seconds >= 0, "checkpoint_seconds", "at least 0", self.checkpoint_seconds)
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        _require(0 <= self.augmentation <= 1, "augmentation", "in [0, 1]", self.augmentation)
        if self.clip_norm is not None:
            _require_number(self, ("clip_norm",))
            _require(self.clip_norm > 0, "clip_norm", "none or above 0", self.clip_norm)
        for name in ("train_limit", "external_limit", "micro_batch"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, int) and value >= 2), name, "none or at least 2, whole", value)
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        inside = all(0 < m < 1 for m in self.milestones)
        _require(rising and inside, "milestones", "rising fractions between 0 and 1", self.milestones)

    def milestone_epochs(self) -> tuple[int, ...]:
        """Epochs after which the learning rate drops: distinct, and each early enough to be felt."""
        drops: list[int] = []
        for fraction in self.milestones:
            epoch = max(math.floor(fraction * self.epochs + 0.5), drops[-1] + 1 if drops else 1)
            if epoch < self.epochs:
                drops.append(epoch)
        return tuple(drops)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialConfig:
        """Raises ConfigError for a name that is not a setting."""
        return cls(**_known(cls, values))

    def replace(self, **changes: Any) -> TrialConfig:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **_known(type(self), changes))


def _known(cls: type[TrialConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in names:
            raise ConfigError(unknown("setting", name, names))
    return dict(values)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One sweep: what is searched with which means, and where it is kept."""

    preset: Preset = "full"
    """`full`: 224 px, 150 epochs, the report's recipe. `laptop`: 32 px, minutes."""
    name: str | None = None
    """Study name; default: the script's and the preset's."""
    storage: str | None = None
    """Where studies are kept: a folder, s3://bucket/prefix or gs://bucket/prefix; default: $MEDTUNE_STORAGE, then a user
    folder."""
    storage_patience: float = 300.0
    """Seconds that trials and the study wait for storage that is full, read-only or gone, before the study stops."""
    new: bool = False
    """Start another study instead of continuing the one of this name."""
    resume: bool = False
    """Go on with the study of this name; an error where there is none."""
    trials: int = 64
    """Trials in all, those already in the study included."""
    random_starts: int | None = None
    """Random trials before TPE models the results; none: a quarter of the trials, at most 10."""
    report_first: bool = True
    """Try the report's settings first."""
    first_rung: float = 0.2
    """ASHA's first rung as a fraction of the epochs."""
    reduction: int = 2
    """ASHA keeps one in this many at each rung, and rungs are this factor apart."""
    keep: int = 3
    """Trials, best first, whose checkpoints stay on disk."""
    concurrent: int | None = None
    """Trials at a time; none: as many as the machines hold."""
    cpus_per_trial: int = 1
    """CPU cores each process of a trial computes with."""
    gpus_per_trial: float | None = None
    """GPUs a trial reserves, several for one process each; none: one a process where there is a GPU, else 0."""
    share_gpus: bool = False
    """Let small trials have a GPU together, each its part by what was measured of its need."""
    processes_per_trial: int | None = None
    """Processes that train one trial together, sharing its batches; none: one for each of its GPUs."""
    machine_faults: int = 3
    """Times a trial is started again after its process or machine died, counted since it last got an epoch further."""
    retries: int = 0
    """Times a trial goes on from its last checkpoint after an error of its own; a loss that is not finite would repeat."""
    alike_failures: int = 5
    """The study stops when the first trials to end, so many, all failed alike; 0: it goes on."""
    data_dir: Path | None = None
    """Folder with the data files; default: $MEDTUNE_DATA, then a user cache folder."""
    external_dir: Path | None = None
    """Folder in the external set's layout; default: $MEDTUNE_EXTERNAL_DIR, then the data folder."""
    wandb: WandbMode = "auto"
    """auto: upload where there is a key, else offline; offline: never upload; off: no W&B."""
    wandb_project: str = "medtune"
    """W&B project."""
    trial: Annotated[TrialConfig, tyro.conf.arg(name="")] = field(default_factory=TrialConfig)
    """Settings every trial shares; the search space overrides those it searches."""

    def __post_init__(self) -> None:
        _require_choices(self, preset=Preset, wandb=WandbMode)
        whole = ("trials", "reduction", "keep", "cpus_per_trial", "machine_faults", "retries", "alike_failures")
        _require_number(self, whole, whole=True)
        at_least = {"trials": 1, "keep": 1, "cpus_per_trial": 1, "machine_faults": 0, "retries": 0, "alike_failures": 0}
        for name, least in at_least.items():
            _require(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))
        _require_number(self, ("storage_patience",))
        _require(self.storage_patience >= 0, "storage_patience", "at least 0", self.storage_patience)
        if self.storage is not None:
            object.__setattr__(self, "storage", str(self.storage))
        _require(0 < self.first_rung <= 1, "first_rung", "in (0, 1]", self.first_rung)
        _require(self.reduction >= 2, "reduction", "at least 2", self.reduction)
        for name in ("concurrent", "random_starts", "processes_per_trial"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, int) and value >= 1), name, "at least 1, whole", value)
        gpus = self.gpus_per_trial
        if gpus is not None:
            _require_number(self, ("gpus_per_trial",))
        whole_or_part = gpus is None or 0 <= gpus <= 1 or (gpus > 1 and gpus == int(gpus))
        _require(whole_or_part, "gpus_per_trial", "0 to 1, or a whole number", gpus)
        rule = f"0 or one for each of {self.processes()} processes (processes_per_trial)"
        several = self.processes() > 1 or (gpus or 0) > 1
        _require(not several or gpus in (None, 0, self.processes()), "gpus_per_trial", rule, gpus)
        _require(not (self.new and self.resume), "resume", "left out with new, which starts another study", self.resume)
        if self.share_gpus:
            _require(gpus is None, "share_gpus", "off where gpus_per_trial says what a trial gets", True)
            _require(self.processes() == 1, "share_gpus", "off where several processes train a trial", True)
        plain = self.name is None or re.fullmatch(r"\w[\w.-]*", self.name, re.ASCII)
        _require(bool(plain), "name", "letters, digits, '-', '_' and '.' alone", self.name)

    def rungs(self, epochs: int | None = None) -> tuple[int, ...]:
        """Epochs at which ASHA decides on a trial of so many epochs (none: the study's); the last epoch is no rung."""
        epochs = epochs or self.trial.epochs
        rungs: list[int] = []
        fraction = self.first_rung
        while fraction < 1:
            epoch = max(1, math.floor(fraction * epochs + 0.5))
            if epoch < epochs and epoch not in rungs:
                rungs.append(epoch)
            fraction *= self.reduction
        return tuple(rungs)

    def processes(self) -> int:
        """Processes that train one trial together."""
        return self.processes_per_trial or max(1, int(self.gpus_per_trial or 0))

    def starts(self) -> int:
        """Random trials before TPE models, so that it models at least half of them."""
        return self.random_starts if self.random_starts is not None else max(1, min(10, self.trials // 4))


def preset(name: Preset) -> StudyConfig:
    """The defaults of a preset."""
    if name == "full":
        return StudyConfig()
    if name == "laptop":
        trial = TrialConfig(image_size=32, epochs=5, batch_size=32, train_limit=512, external_limit=400)
        return StudyConfig(preset="laptop", trials=16, trial=trial)
    raise ConfigError(unknown("preset", name, get_args(Preset)))
