"""What a script in sweeps/ calls: command line -> StudyConfig -> study -> the best configuration."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from medtune.config import StudyConfig, preset
from medtune.definition import Definition, with_preset_fixed
from medtune.driver import outliving_client, require_same_script
from medtune.errors import DataError, DataMissing, MedtuneError
from medtune.launch import cluster_address
from medtune.search.plan import COSTS, Settings, plan
from medtune.search.space import SearchSpace
from medtune.study import run_study


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """What the command line of a planned study has besides a study's settings; a script's own flags derive from it."""

    seeds: int = 5
    """Trainings of each setting, the first from --seed, each other from the next seed."""


P = TypeVar("P", bound=PlanFlags)


def main(
    script: str,
    space: SearchSpace,
    report_settings: Sequence[Settings],
    *,
    description: str,
    defaults: Settings | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run the study that the command line describes; returns the exit status (1: no trial was trained to the end).

    `report_settings`: the report's base setting, then its variations; presets other than `full` try the base alone.
    `defaults`: the script's own, where they are not the preset's. A searched setting that is given on the command line is
    fixed at that value, and what follows it with it.
    """

    def define(args: Sequence[str]) -> tuple[Definition, StudyConfig]:
        config, falls_back, _ = parse(args, description, defaults)
        config, fallback = with_what_is_there(config, script) if falls_back else (config, False)
        first = report_settings if config.preset == "full" else report_settings[:1]
        definition = Definition(script=script, space=space, first=first, external_fallback=fallback)
        return with_preset_fixed(definition, config, given_names(args, space.dimensions))

    return _run(define, argv)


def main_planned(
    planned: Callable[[P], tuple[str, Sequence[Settings]]],
    flags: P,
    *,
    description: str,
    defaults: Settings | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Train settings in order, each from several seeds; returns the exit status as `main` does.

    `planned`: the script's name and its settings, for the script's own flags (`flags`: their defaults). A planned
    setting given on the command line leaves the settings that have that value; epochs and batch size hold for all.
    """

    def define(args: Sequence[str]) -> tuple[Definition, StudyConfig]:
        own = {**(defaults or {}), "first_rung": 1.0, "trials": len(planned(flags)[1]) * flags.seeds}
        config, falls_back, chosen = parse(args, description, own, flags)
        script, settings = planned(chosen)
        config, fallback = with_what_is_there(config, script) if falls_back else (config, False)
        given = given_names(args, dict.fromkeys(name for one in settings for name in one))
        without = () if config.preset == "full" else COSTS
        first = plan(settings, config.trial, seeds=chosen.seeds, given=given, without=without)
        if not given_names(args, ["trials"]):
            config = dataclasses.replace(config, trials=len(first))
        space = SearchSpace.of(first)
        return Definition(script=script, space=space, first=first, planned=True, external_fallback=fallback), config

    return _run(define, argv)


def _run(define: Callable[[Sequence[str]], tuple[Definition, StudyConfig]], argv: Sequence[str] | None) -> int:
    with outliving_client() if cluster_address() else contextlib.nullcontext():
        return _run_here(define, argv)


def _run_here(define: Callable[[Sequence[str]], tuple[Definition, StudyConfig]], argv: Sequence[str] | None) -> int:
    try:
        if cluster_address():
            require_same_script(Path(sys.argv[0]))
        definition, config = define(list(sys.argv[1:] if argv is None else argv))
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


@dataclass(frozen=True)
class _NoFlags:
    """A script without flags of its own."""


def parse(
    args: Sequence[str], description: str, defaults: Settings | None = None, flags: Any = None
) -> tuple[StudyConfig, bool, Any]:
    """Settings from the command line, on the preset's and the script's `defaults`; whether to fall back; the flags.

    `flags`: a frozen dataclass, the defaults of the script's own flags.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="full")
    early.add_argument("--fallback", action="store_true")
    known, rest = early.parse_known_args(args)
    own = flags or _NoFlags()
    # tyro takes one class: the script's flags and the study's settings side by side, without prefixes.
    both = dataclasses.make_dataclass(
        "Settings",
        [(name, Annotated[kind, tyro.conf.arg(name="")]) for name, kind in (("flags", type(own)), ("study", StudyConfig))],
    )
    found = tyro.cli(
        both,
        default=both(flags=own, study=_defaults(known.preset, defaults or {})),
        args=[*rest, "--preset", known.preset],
        description=description,
    )
    return found.study, known.fallback, found.flags


def _defaults(name: Any, own: Mapping[str, Any]) -> StudyConfig:
    """The preset with a script's own defaults; what it says of `COSTS` is for the preset `full`."""
    config = preset(name)
    own = {k: v for k, v in own.items() if config.preset == "full" or k not in COSTS}
    of_study = {field.name for field in dataclasses.fields(StudyConfig)}
    trial = config.trial.replace(**{k: v for k, v in own.items() if k not in of_study})
    return dataclasses.replace(config, trial=trial, **{k: v for k, v in own.items() if k in of_study})


def given_names(args: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that the command line gives."""
    flags = {arg.split("=", 1)[0].lstrip("-").replace("-", "_") for arg in args if arg.startswith("--")}
    return [name for name in names if name in flags or f"no_{name}" in flags]
