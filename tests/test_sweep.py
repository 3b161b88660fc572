"""The command line of a script: presets, fixed settings, what falls back and what does not."""

import pytest

import medtune.models
from medtune import sweep
from medtune.definition import Definition, with_preset_fixed
from medtune.errors import DataError
from medtune.recipes import MODELS
from medtune.search.space import Choice, Real, SearchSpace
from sweeps import all_models, medvit, report
from sweeps.medmamba import REPORT, SPACE


def parse(*args):
    return sweep.parse(list(args), "")[0]


def fixed(*args, space=SPACE, first=REPORT):
    return with_preset_fixed(
        Definition(script="x", space=space, first=first), parse(*args), sweep.given_names(args, space.dimensions)
    )


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """No data anywhere, and no server to get them from."""
    def refuse(**_):
        raise DataError("no network")

    for name in ("MEDTUNE_DATA", "MEDTUNE_STORAGE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("MEDTUNE_EXTERNAL_DIR", raising=False)
    monkeypatch.setattr("medtune.data.cli.get", refuse)


def test_a_preset_is_other_defaults_that_flags_override():
    config, falls_back, _ = sweep.parse(["--preset", "laptop", "--epochs", "3"], "")
    assert (config.trial.image_size, config.trial.epochs, config.trials, falls_back) == (32, 3, 16, False)
    assert parse().trial.image_size == 224


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--preset", "laptop", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--trials", "--lr", "--first-rung", "--wandb", "--external-dir", "--milestones", "--momentum", "--seed"):
        assert flag in text
    assert "(default: 32)" in text and "(default: 16)" in text


def test_a_misspelt_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse("--epoch", "3")
    assert "--epochs" in capsys.readouterr().err


def test_a_rate_that_never_drops_leaves_nothing_to_search_in_milestones_and_gamma():
    definition, _ = fixed("--schedule", "constant")
    assert not {"milestones", "gamma"} & set(definition.space.dimensions)
    assert all("gamma" not in settings for settings in definition.first) and definition.first


def test_a_new_dimension_has_its_default_in_the_settings_tried_first():
    """Not a draw: the report had no weight decay and no weighted loss."""
    more = SearchSpace(
        **SPACE.dimensions,
        imbalance=Choice(options=("none", "weighted")),
        augmentation=Real(low=0.0, high=1.0),
        weight_decay=Real(low=1e-6, high=1e-2, log=True),
    )
    definition, _ = fixed(space=more)
    assert all((one["imbalance"], one["augmentation"]) == ("none", 0.0) for one in definition.first)
    assert list(more.unnamed(definition.first[0])) == ["weight_decay"]  # its default, 0, is outside: said when it starts
    assert "momentum" not in definition.first[0] and len(definition.first) == len(REPORT)


def test_a_searched_setting_given_on_the_command_line_is_fixed():
    definition, config = fixed("--model", "medmamba_t", "--lr=0.01")
    assert not {"model", "lr"} & set(definition.space.dimensions) and "gamma" in definition.space.dimensions
    assert (config.trial.model, config.trial.lr) == ("medmamba_t", 0.01)
    assert definition.first == (), "the report's settings are of another model"
    small, _ = fixed("--gamma", "0.1")
    assert len(small.first) == 4 and not any("gamma" in settings for settings in small.first)


def test_no_report_first_leaves_all_to_the_searcher():
    assert fixed("--no-report-first")[0].first == ()


def test_without_data_the_script_fails_with_the_way_out(nothing_here, capsys):
    assert sweep.main("medmamba", SPACE, REPORT, description="", argv=["--preset", "laptop"]) == 2
    said = capsys.readouterr().err
    assert "pneumoniamnist.npz" in said and "medtune data get" in said


def test_make_sweep_falls_back_to_generated_images_loudly(nothing_here, capsys):
    config, fallback = sweep.with_what_is_there(parse("--preset", "laptop", "--fallback"), "medmamba")
    assert (config.trial.pair, config.name, fallback) == ("synthetic", "medmamba-laptop-synthetic", False)
    assert "GENERATED" in capsys.readouterr().out


def test_broken_data_are_an_error_not_a_reason_to_fall_back(nothing_here, tmp_path, monkeypatch):
    folder = tmp_path / "MEDTUNE_DATA"
    folder.mkdir()
    (folder / "pneumoniamnist.npz").write_bytes(b"PK broken")
    with pytest.raises(DataError, match=r"pneumoniamnist\.npz"):
        sweep.with_what_is_there(parse("--preset", "laptop", "--fallback"), "medmamba")


@pytest.fixture
def every_model(monkeypatch):
    """Names alone: nothing is built here."""
    monkeypatch.setattr(medtune.models, "available", lambda: MODELS)


def test_a_preset_with_epochs_and_batch_of_its_own_has_them_for_every_model(every_model):
    laptop, config = fixed("--preset", "laptop", space=all_models.SPACE, first=all_models.REPORT[:1])
    assert not {"batch_size", "epochs"} & set(laptop.space.dimensions) and "model" in laptop.space.dimensions
    assert (config.trial.batch_size, config.trial.epochs) == (32, 5)
    assert laptop.first[0]["model"] == "medmamba_s" and "epochs" not in laptop.first[0]


def test_a_model_given_brings_its_familys_epochs_and_batch(every_model):
    definition, config = fixed("--model", "medvit_base", space=all_models.SPACE, first=all_models.REPORT)
    assert (config.trial.batch_size, config.trial.epochs, config.rungs()) == (128, 100, (20, 40, 80))
    assert len(definition.first) == 1
    given, config = fixed("--model", "medvit_base", "--epochs", "7", space=all_models.SPACE, first=all_models.REPORT)
    assert (config.trial.batch_size, config.trial.epochs) == (128, 7) and len(given.first) == 1
    _, laptop = fixed("--preset", "laptop", "--model", "medvit_base", space=all_models.SPACE)
    assert (laptop.trial.batch_size, laptop.trial.epochs) == (32, 5)


def test_a_scripts_own_defaults_stand_where_the_preset_has_none_of_its_own(every_model):
    full, _, _ = sweep.parse([], "", medvit.DEFAULTS)
    assert (full.trial.model, full.trial.batch_size, full.trial.epochs, full.rungs()) == ("medvit_small", 128, 100, (25, 50))
    laptop, _, _ = sweep.parse(["--preset", "laptop", "--first-rung", "0.4"], "", medvit.DEFAULTS)
    assert (laptop.trial.model, laptop.trial.batch_size, laptop.trial.epochs) == ("medvit_small", 32, 5)
    assert laptop.first_rung == 0.4


def test_a_batch_given_holds_for_every_model(every_model):
    definition, config = fixed("--batch-size", "32", space=all_models.SPACE, first=all_models.REPORT)
    assert config.trial.batch_size == 32 and "batch_size" not in definition.space.dimensions
    assert "epochs" in definition.space.dimensions and len(definition.first) == 7


def test_a_setting_switched_off_on_the_command_line_is_fixed_too(every_model):
    definition, config = fixed("--no-patch-momentum", space=all_models.SPACE)
    assert "patch_momentum" not in definition.space.dimensions and not config.trial.patch_momentum


@pytest.fixture
def started(monkeypatch, every_model):
    """What `main_planned` would run, by command line."""
    def start(*args):
        runs = []

        def keep(config, definition):
            runs.append((config, definition))
            raise DataError("enough")

        monkeypatch.setattr(sweep, "run_study", keep)
        assert sweep.main_planned(
            report.planned, report.Flags(), description="", defaults={"selection": "val/oa"}, argv=list(args)
        ) == 2
        return runs[0] if runs else None

    return start


def test_the_report_is_fourteen_settings_from_five_seeds(started):
    config, definition = started()
    assert (config.trials, len(definition.first), definition.script, definition.planned) == (70, 70, "report", True)
    assert config.trial.selection == "val/oa" and config.rungs() == ()
    assert {one["epochs"] for one in definition.first} == {100, 150}
    config, definition = started("--as-run", "--seeds", "2", "--trials", "3")
    assert (config.trials, len(definition.first), definition.script) == (3, 28, "report-as-run")
    assert {one["schedule"] for one in definition.first} == {"constant"}


def test_the_report_on_a_laptop_has_the_presets_epochs_and_batch(started):
    config, definition = started("--preset", "laptop", "--seeds", "1")
    assert config.trials == 14 and (config.trial.epochs, config.trial.batch_size) == (5, 32)
    assert not any({"epochs", "batch_size"} & set(one) for one in definition.first)


def test_one_model_of_the_report(started, capsys):
    config, definition = started("--model", "medvit_small", "--seeds", "2")
    assert config.trials == 2 and {one["model"] for one in definition.first} == {"medvit_small"}
    capsys.readouterr()
    assert started("--epochs", "3", "--model", "vim_tiny") is None
    assert "no planned settings have model 'vim_tiny'. Planned are model: medmamba_b, " in capsys.readouterr().err


def test_help_shows_a_scripts_own_flags(capsys):
    with pytest.raises(SystemExit):
        sweep.main_planned(report.planned, report.Flags(), description="", argv=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--seeds" in text and "--as-run" in text and "(default: 70)" in text
