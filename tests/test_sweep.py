"""The command line of a script: presets, fixed settings, what falls back and what does not."""

import pytest

from medtune import sweep
from medtune.errors import DataError
from medtune.study import Definition, with_preset_fixed
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
