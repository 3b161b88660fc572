"""What a study is: what a script defines, checked, written into study.json and compared with what was begun."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import medtune
from medtune import models
from medtune.config import StudyConfig
from medtune.data import PairData
from medtune.data.pack import sha256_of
from medtune.errors import ConfigError, StudyError
from medtune.record import write_json
from medtune.search.plan import COSTS, Settings
from medtune.search.space import SearchSpace
from medtune.wandb_space import parameters

# Not part of what a study is: they may differ from one launch to the next.
_FREE = {"preset", "name", "storage", "new", "trials", "keep", "concurrent", "cpus_per_trial", "gpus_per_trial"} | {
    "processes_per_trial", "share_gpus", "machine_faults", "retries", "alike_failures", "resume", "storage_patience",
    "data_dir", "external_dir", "wandb", "wandb_project", "report_first",
}  # fmt: skip
_FREE_TRIAL = {"resamples", "checkpoint_seconds", "activation_checkpointing"}


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What a script brings: its name, its space, the settings to try first."""

    script: str
    space: SearchSpace
    first: Sequence[Settings] = ()
    planned: bool = False
    """Train the settings in `first`, in order and to the end: no searcher, no ASHA. The space is `SearchSpace.of` them."""
    external_fallback: bool = False
    """Test on the training set's own test split where the external set is missing; `make sweep` alone asks for it."""


def check_definition(config: StudyConfig, definition: Definition) -> None:
    """Raises ConfigError for settings that would make no valid trial, and for what a plan cannot do."""
    for settings in definition.first:
        definition.space.encode(settings)
        config.trial.replace(**settings)
    if not definition.planned:
        definition.space.check(config.trial)
    elif config.trials > len(definition.first):
        raise ConfigError(
            f"trials must be at most the {len(definition.first)} that are planned, got {config.trials}: "
            "lower --trials, or plan more with --seeds"
        )
    elif config.rungs():
        raise ConfigError(f"first_rung must be 1 in a planned study, which stops no trial early, got {config.first_rung}")
    _require_shares(config, definition)


def check_pretrained(config: StudyConfig, definition: Definition, classes: int) -> list[str]:
    """What there is to say about the weights that trials start from. Raises CheckpointError where they do not fit."""
    notes = []
    for source in definition.space.values("pretrained", config.trial):
        if source is not None:
            found = models.check_pretrained(definition.space.values("model", config.trial), source, classes)
            notes += [f"starts from {source}", *found]
    return notes


def _require_shares(config: StudyConfig, definition: Definition) -> None:
    """Each of a trial's processes needs two images of a batch (BatchNorm)."""
    least = min(definition.space.values("batch_size", config.trial))
    if least < 2 * config.processes():
        raise ConfigError(f"batch_size must be at least 2 for each of a trial's {config.processes()} processes, got {least}")


def check_same_study(folder: Path, name: str, config: StudyConfig, definition: Definition, data: PairData) -> None:
    """Write study.json, or refuse to go on with a study that was begun otherwise, showing the difference."""
    path = folder / "study.json"
    now = describe(config, definition, data)
    if not path.exists():
        record = {"id": f"{name}-{int(time.time()):x}", "name": name, "created": time.time(), **now}
        write_json(path, record | {"version": medtune.__version__})
        return
    record = read_study(folder)
    changes = [
        f"  {kind}.{key}: {record[kind].get(key)!r} -> {now[kind].get(key)!r}"
        for kind in ("settings", "space", "data")
        for key in sorted({*record[kind], *now[kind]})
        if record[kind].get(key) != now[kind].get(key)
    ]
    pairs = enumerate(zip(record["first"], now["first"], strict=False), 1)
    other = next((f"  settings {n}: {was} -> {is_now}" for n, (was, is_now) in pairs if was != is_now), None)
    if other or record.get("planned", False) != now["planned"]:
        changes.append(other or "  a plan and a search are not the same study")
    if changes:
        raise StudyError(
            f"study {name!r} in {folder} was begun with other settings:\n" + "\n".join(changes) + "\n"
            "Its trials would not compare. Start another with --new or --name, or give the settings it was begun with."
        )
    if definition.planned and len(now["first"]) > len(record["first"]):
        write_json(path, record | {"first": now["first"]})  # the plan has grown


def describe(config: StudyConfig, definition: Definition, data: PairData) -> dict[str, Any]:
    """What makes a study this study, in plain JSON values."""
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE | {"trial"}}
    settings |= {k: v for k, v in config.trial.to_dict().items() if k not in _FREE_TRIAL}
    first = [json.loads(json.dumps(dict(item))) for item in definition.first]
    # The longest stands for a study whose trials differ in epochs.
    epochs = max(definition.space.values("epochs", config.trial))
    about = {**data.fingerprint, "external_name": data.external_name, **_pretrained(config, definition)}
    return {"settings": settings, "space": definition.space.describe(), "first": first, "data": about} | {
        "script": definition.script,
        "preset": config.preset,
        "classes": list(data.classes),
        "synthetic": data.synthetic,
        "verified_cpn": data.verified_cpn,
        "planned": definition.planned,
        "parameters": parameters(definition.space),
        "rungs": list(config.rungs(epochs)),
        "epochs": epochs,
        "selection": config.trial.selection,
    }


def _pretrained(config: StudyConfig, definition: Definition) -> dict[str, str]:
    """Digests of the weights that trials start from: other weights under the same name are another study."""
    found = {}
    for source in definition.space.values("pretrained", config.trial):
        if source is not None and Path(source).is_file():
            found[f"pretrained {Path(source).name}"] = sha256_of(Path(source))
    return found


def read_study(folder: Path) -> dict[str, Any]:
    """study.json. Raises StudyError if it is missing or damaged."""
    try:
        return json.loads((folder / "study.json").read_text())
    except FileNotFoundError:
        raise StudyError(f"no study in {folder}: `medtune studies` lists those there are") from None
    except json.JSONDecodeError as error:
        raise StudyError(f"{folder / 'study.json'} is damaged ({error}); restore it or start another study") from None


def with_preset_fixed(
    definition: Definition, config: StudyConfig, given: Sequence[str]
) -> tuple[Definition, StudyConfig]:
    """The study for settings given on the command line: those that would be searched are fixed instead.

    So are those that follow them, and, in presets other than `full`, all that follow others: the preset has its own.
    """
    held = definition.space.following() if config.preset != "full" else []
    constant = config.trial.schedule == "constant" and ("schedule" in given or "schedule" not in definition.space.dimensions)
    void = ("milestones", "gamma") if constant else ()  # of a rate that never drops
    space, trial = definition.space.without([*given, *held, *void], config.trial)
    first: list[Settings] = []
    for settings in definition.first if config.report_first else ():
        named = {name: value for name, value in settings.items() if name in space.dimensions}
        searched = named and space.completed(named, trial)
        fits = all(settings.get(k) == getattr(trial, k) for k in given if k in settings and k not in COSTS)
        if fits and searched and searched not in first:
            first.append(searched)
    return replace(definition, space=space, first=tuple(first)), replace(config, trial=trial)
