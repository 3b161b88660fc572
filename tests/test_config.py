"""Settings: strict about names and values, presets, and what follows from them."""

import dataclasses
import json

import pytest

from medtune.config import StudyConfig, TrialConfig, preset
from medtune.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("lr", 0.0, r"lr must be in \(0, 1\], got 0.0"),
        ("lr", float("nan"), "lr must be a finite number"),
        ("lr", "fast", "lr must be a finite number, got 'fast'"),
        ("momentum", 1.0, r"momentum must be in \[0, 1\)"),
        ("weight_decay", -1.0, "weight_decay must be at least 0"),
        ("gamma", 0.0, r"gamma must be in \(0, 1\]"),
        ("epochs", 0, "epochs must be at least 1"),
        ("epochs", 1.5, "epochs must be a whole number"),
        ("batch_size", 1, "batch_size must be at least 2"),
        ("image_size", 20, "image_size must be at least 28"),
        ("native_size", 32, "native_size must be one of 28, 64, 128, 224"),
        ("milestones", (0.5, 0.3), "milestones must be rising fractions"),
        ("milestones", (0.5, 1.0), "milestones must be rising fractions"),
        ("train_limit", 2.5, "train_limit must be none or at least 2, whole"),
        ("train_limit", 1, "train_limit must be none or at least 2"),
        ("optimizer", "adamm", "Did you mean 'adamw'|Did you mean 'adam'"),
        ("model", "medmamba_x", "unknown model 'medmamba_x'. Did you mean"),
        ("pair", "pneumoniamnist", "Did you mean 'pneumoniamnist-cpn'"),
        ("selection", "val/acu", "Did you mean 'val/auc'"),
        ("precision", "fp16", "unknown precision 'fp16'"),
        ("seed", -1, "seed must be at least 0"),
        ("schedule", "cosine", "unknown schedule 'cosine'"),
        ("imbalance", "balance", "Did you mean 'balanced'"),
        ("augmentation", 1.5, r"augmentation must be in \[0, 1\]"),
        ("clip_norm", 0.0, "clip_norm must be none or above 0"),
        ("micro_batch", 1, "micro_batch must be none or at least 2"),
        ("patch_momentum", True, "patch_momentum is for MedViT alone, got model 'medmamba_s'"),
    ],
)
def test_a_bad_trial_setting_names_field_value_and_rule(field, value, rule):
    with pytest.raises(ConfigError, match=rule):
        TrialConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("trials", 0, "trials must be at least 1"),
        ("reduction", 1, "reduction must be at least 2"),
        ("first_rung", 0.0, r"first_rung must be in \(0, 1\]"),
        ("keep", 0, "keep must be at least 1"),
        ("concurrent", 0, "concurrent must be at least 1"),
        ("gpus_per_trial", -1, "gpus_per_trial must be 0 to 1, or a whole number"),
        ("gpus_per_trial", float("nan"), "gpus_per_trial must be a finite number"),
        ("gpus_per_trial", float("inf"), "gpus_per_trial must be a finite number"),
        ("gpus_per_trial", -0.5, "gpus_per_trial must be 0 to 1, or a whole number"),
        ("gpus_per_trial", 1.5, "gpus_per_trial must be 0 to 1, or a whole number"),
        ("random_starts", 2.5, "random_starts must be at least 1, whole"),
        ("name", "a/b", "name must be letters, digits"),
        ("name", "../x", "name must be letters, digits"),
        ("wandb", "on", "unknown wandb 'on'"),
    ],
)
def test_a_bad_study_setting_names_field_value_and_rule(field, value, rule):
    with pytest.raises(ConfigError, match=rule):
        StudyConfig(**{field: value})


def test_an_unknown_name_has_the_nearest_right_one():
    with pytest.raises(ConfigError, match=r"unknown setting 'momentun'\. Did you mean 'momentum'"):
        TrialConfig.from_dict({"momentun": 0.5})
    with pytest.raises(ConfigError, match="Did you mean 'gamma'"):
        TrialConfig().replace(gama=0.5)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrialConfig().lr = 1.0  # type: ignore[misc]


def test_round_trip_through_json():
    config = TrialConfig(model="medmamba_t", milestones=(0.2, 0.7), train_limit=64)
    assert TrialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_defaults_are_the_reports_recipe():
    trial = preset("full").trial
    assert (trial.image_size, trial.epochs, trial.batch_size, trial.optimizer, trial.lr) == (224, 150, 64, "adam", 1e-3)
    assert trial.milestone_epochs() == (50, 75) and trial.gamma == 0.1


@pytest.mark.parametrize(("name", "rungs"), [("full", (30, 60, 120)), ("laptop", (1, 2, 4))])
def test_presets_have_three_rungs_so_at_most_four_external_tests(name, rungs):
    assert preset(name).rungs() == rungs


def test_milestones_are_distinct_epochs_before_the_last():
    assert TrialConfig(epochs=5).milestone_epochs() == (2, 3)
    assert TrialConfig(epochs=2, milestones=(0.3, 0.4, 0.9)).milestone_epochs() == (1,)
    assert TrialConfig(epochs=1).milestone_epochs() == ()


@pytest.mark.parametrize("trials", [1, 4, 16, 64, 200])
def test_tpe_models_at_least_half_of_the_trials(trials):
    assert StudyConfig(trials=trials).starts() <= max(1, trials // 2)


def test_rungs_follow_their_settings():
    trial = TrialConfig(epochs=100)
    assert StudyConfig(trial=trial, first_rung=0.1, reduction=3).rungs() == (10, 30, 90)
    assert StudyConfig(trial=trial, first_rung=1.0).rungs() == ()
