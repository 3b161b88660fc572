"""The report's settings as data, and what each family of models is trained with.

Source: the study report "MedMamba: Vision Mamba for Medical Image Classification" (2025) and, where it is silent, the
scripts that were published with it. Every figure here is the report's unless a comment says that it is the scripts'.
"""

from __future__ import annotations

from medtune.search.plan import Settings

MEDMAMBA = ("medmamba_t", "medmamba_s", "medmamba_b")
MEDVIT = ("medvit_small", "medvit_base", "medvit_large")
VMAMBA = ("vmamba_t", "vmamba_s", "vmamba_b")
VIM = ("vim_tiny", "vim_small")
MODELS = (*MEDMAMBA, *MEDVIT, "resnet50", *VMAMBA, *VIM)

SELECTION = "val/oa"
"""The weights tested are those of the epoch with the best validation accuracy (scripts)."""

# VMamba and Vim were not trained for the report: as its other Mamba family, they have MedMamba's batch and epochs.
_LIKE_MEDMAMBA = (*MEDMAMBA, *VMAMBA, *VIM)
BATCH_SIZES = {model: 64 if model in _LIKE_MEDMAMBA else 128 for model in MODELS}
"""Images per optimizer step, by model."""
EPOCHS = {model: 150 if model in _LIKE_MEDMAMBA else 100 for model in MODELS}
"""Passes over the training set, by model."""

_ADAM = {"optimizer": "adam", "lr": 1e-3, "gamma": 0.1}
# Epochs 50 and 75, of 150 and of 100.
_OF_150 = {"milestones": (1 / 3, 1 / 2), "batch_size": 64, "epochs": 150}
_OF_100 = {"milestones": (1 / 2, 3 / 4), "batch_size": 128, "epochs": 100}

_MEDMAMBA_S: Settings = {"model": "medmamba_s", **_ADAM, **_OF_150}
_SGD = {"optimizer": "sgd", "momentum": 0.0}


def report_models(*, as_run: bool = False) -> tuple[Settings, ...]:
    """The seven models of the report's tables, each at its setting. `as_run`: see `report_settings`."""
    medmamba = [{**_MEDMAMBA_S, "model": model} for model in ("medmamba_b", "medmamba_s", "medmamba_t")]
    medvit: list[Settings] = [{"model": model, **_ADAM, **_OF_100} for model in ("medvit_base", "medvit_small")]
    # Also in 16 bits, which here is every model's precision where the GPU has it (scripts).
    large = {"model": "medvit_large", **_ADAM, **_OF_100, "clip_norm": 1.0}
    resnet = {"model": "resnet50", **_ADAM, **(_OF_150 if as_run else _OF_100)}
    return _as_run((*medmamba, large, *medvit, resnet), as_run)


def report_variations(*, as_run: bool = False) -> tuple[Settings, ...]:
    """The seven variations of the report's appendix, all of MedMamba-s. `as_run`: see `report_settings`."""
    changes: tuple[Settings, ...] = (
        {"lr": 1e-4},
        {"lr": 1e-2},
        {"gamma": 1e-3},
        {"gamma": 1e-2},
        {**_SGD, "lr": 1e-4},
        {**_SGD, "gamma": 1e-3},
        {**_SGD, "gamma": 1e-2},
    )
    return _as_run(tuple({**_MEDMAMBA_S, **change} for change in changes), as_run)


def report_settings(as_run: bool) -> tuple[Settings, ...]:
    """The report's fourteen settings: its seven models, then the seven variations of its appendix.

    `as_run`: as the published scripts ran and not as the report says: the learning rate stays constant, since the
    schedule was never stepped, and ResNet50 has batch 64 and 150 epochs. Settings that differ in gamma alone are then
    one and the same; they are all here because the report lists them, and the spread it printed between them is noise.
    """
    return (*report_models(as_run=as_run), *report_variations(as_run=as_run))


def _as_run(settings: tuple[Settings, ...], as_run: bool) -> tuple[Settings, ...]:
    return tuple({**one, "schedule": "constant"} for one in settings) if as_run else settings
