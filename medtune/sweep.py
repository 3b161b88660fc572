"""What a script in sweeps/ calls: command line -> StudyConfig -> study -> the best configuration."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import tyro

from medtune.config import StudyConfig, preset
from medtune.errors import DataError, DataMissing, MedtuneError
from medtune.search.space import SearchSpace
from medtune.study import Definition, Settings, run_study, with_preset_fixed


def main(
    script: str,
    space: SearchSpace,
    report_settings: Sequence[Settings],
    *,
    description: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Run the study that the command line describes; returns the exit status (1: no trial was trained to the end).

    `report_settings`: the report's base setting, then its variations; presets other than `full` try the base alone.
    A searched setting that is given on the command line is fixed at that value.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        config, falls_back = parse(args, description)
        fallback = False
        if falls_back:
            config, fallback = with_what_is_there(config, script)
        first = report_settings if config.preset == "full" else report_settings[:1]
        definition = Definition(script=script, space=space, first=first, external_fallback=fallback)
        definition = with_preset_fixed(definition, config, given_names(args, space))
        folder = run_study(config, definition)
    except MedtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    from medtune.results import print_outcome

    return 0 if print_outcome(folder) else 1


def with_what_is_there(config: StudyConfig, script: str) -> tuple[StudyConfig, bool]:
    """`make sweep` must always run: real data where they are or can be had, else less, said in one loud line.

    Returns the settings and whether the external test falls back to the training set's own test split. The study's name
    says which data it ran on, so that a later run on better data is another study. Data that are there but broken are
    an error: they raise DataError.
    """
    from medtune.data import cli as data
    from medtune.data import load_pair

    trial = config.trial
    places = {"native_size": trial.native_size, "data_dir": config.data_dir, "external_dir": config.external_dir}

    def there(fallback: bool) -> bool:
        try:
            load_pair(trial.pair, external_fallback=fallback, **places)  # type: ignore[arg-type]
        except DataMissing:
            return False
        return True

    if there(False):
        return config, False
    try:
        print(f"{trial.pair} is not complete here; trying to download it", flush=True)
        data.get(pair=trial.pair, native_size=trial.native_size, data_dir=config.data_dir)
    except DataError as error:
        print(f"  not downloaded: {' '.join(str(error).split())}")
    if there(False):
        return config, False
    name = config.name or f"{script}-{config.preset}"
    if there(True):
        own = "the external test is on the training set's own test split, named so"
        print(f"!!! THE EXTERNAL SET OF {trial.pair.upper()} IS NOT HERE: {own}", flush=True)
        return dataclasses.replace(config, name=f"{name}-own-test"), True
    print("!!! NO DATA HERE: this study runs on GENERATED images, its figures mean nothing", flush=True)
    synthetic = trial.replace(pair="synthetic")
    return dataclasses.replace(config, name=f"{name}-synthetic", trial=synthetic), False


def parse(args: Sequence[str], description: str) -> tuple[StudyConfig, bool]:
    """Settings from the command line, on the defaults of the preset that it names; and whether to fall back."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="full")
    early.add_argument("--fallback", action="store_true")
    known, rest = early.parse_known_args(args)
    config = tyro.cli(
        StudyConfig,
        default=preset(known.preset),
        args=[*rest, "--preset", known.preset],
        description=description,
    )
    return config, known.fallback


def given_names(args: Sequence[str], space: SearchSpace) -> list[str]:
    """Searched settings that the command line gives."""
    flags = {arg.split("=", 1)[0].lstrip("-").replace("-", "_") for arg in args if arg.startswith("--")}
    return [name for name in space.dimensions if name in flags]

