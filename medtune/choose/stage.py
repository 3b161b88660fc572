"""The stage: finalists trained again from seeds that no trial had, in a planned study of its own.

It lies in the study's `stages` folder, so its trainings are no trials of the study: searcher and scheduler never see them.
What a study does when it is killed, its machines go or its storage fails, the stage does: it is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medtune.choose.means import Means
from medtune.config import StudyConfig, TrialConfig
from medtune.definition import Definition
from medtune.driver import add_outcome
from medtune.errors import ConfigError, StudyError
from medtune.results import Study, candidates, data_of, load_study, metric, tested_on_own_split, trial_config
from medtune.search.ledger import Row
from medtune.search.plan import Settings
from medtune.search.space import Listed, SearchSpace
from medtune.storage.home import storage_root, study_names
from medtune.study import run_study

STAGES = "stages"
NAME = "finalists"
FRESH = 1_000_000
"""Added to the study's seed for the first fresh one: the study's trials count up from its seed, and may become more."""


def finalists(study: Study, by: str, top: int) -> list[Row]:
    """The best trials, one of each configuration, best first. Raises StudyError where no trial was trained to the end."""
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    found: dict[str, Row] = {}
    for row in candidates(study, by):
        found.setdefault(str(trial_config(study, row).replace(seed=0)), row)  # a planned study has a setting's replicates
    return list(found.values())[:top]


def settings_of(study: Study, row: Row) -> dict[str, Any]:
    """A trial's value of each setting that the study varies, in plain JSON values; the seed apart."""
    config = trial_config(study, row).to_dict()
    return {name: config[name] for name in study.record["space"] if name != "seed"}


def fresh_seeds(study: Study, count: int) -> list[int]:
    """Seeds that none of the study's trials had: of more, the first are the same. Raises ConfigError for none."""
    if count < 1:
        raise ConfigError(f"seeds must be at least 1, got {count}")
    had = {trial_config(study, row).seed for row in study.rows}
    first = study.record["settings"]["seed"] + FRESH
    return [seed for seed in range(first, first + count + len(had)) if seed not in had][:count]


def planned(before: Sequence[Settings], settings: Sequence[Settings], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The stage's plan: what was planned before, in its places, then what is new, seed by seed."""
    plan = [dict(one) for one in before]
    for seed in seeds:
        plan += [new for one in settings if (new := {**one, "seed": seed}) not in plan]
    return plan


def open_stage(study: Study) -> Study | None:
    """The stage as it is now; None while it was not begun."""
    root = _root(study)
    return load_study(NAME, root) if NAME in study_names(storage_root(root)) else None


def _root(study: Study) -> str:
    return f"{study.where}/{STAGES}"


@dataclass(frozen=True)
class Stage:
    """The stage, trained: each finalist's rows in the order of the seeds."""

    study: Study
    seeds: list[int]
    runs: list[list[Row]]


def train(
    study: Study, chosen: Sequence[Row], seeds: Sequence[int], means: Means, trainable: type | None = None
) -> Stage:
    """Train each finalist from each seed, or go on with it; what was trained before is not trained again.

    Raises as `medtune.study.run_study`, and StudyError when the data are not those of the study.
    """
    settings = [settings_of(study, row) for row in chosen]
    stage = open_stage(study)
    plan = planned(stage.record["first"] if stage else [], settings, seeds)
    places = [[plan.index({**one, "seed": seed}) for seed in seeds] for one in settings]
    if stage is None or not _trained(stage, places):
        config = stage_config(study, plan, 1 + max(map(max, places)), means)
        space = SearchSpace.of(plan, Listed)
        definition = Definition(
            script="choose", space=space, first=plan, planned=True, external_fallback=tested_on_own_split(study)
        )
        _require_same_data(study, config)
        run_study(config, definition, trainable, _ended)
        stage = open_stage(study)
        assert stage is not None
    rows = {row.number: row for row in stage.rows}
    return Stage(stage, list(seeds), [[rows[number] for number in numbers] for numbers in places])


def _ended(folder: Path, show: bool) -> tuple[int, str]:
    """The outcome of the trainings; that of the choice is added to it (`note`)."""
    rows = load_study(str(folder)).rows
    whole = sum(row.state == "COMPLETE" for row in rows)
    return 0 if whole else 1, f"{whole} of {len(rows)} trainings of finalists came to their end"


def note(stage: Stage, message: str, show: Callable[[], object]) -> None:
    """Leave the choice's outcome with the stage's driver, whose terminal nobody may have seen; `show` prints all of it."""
    with contextlib.suppress(OSError):  # the choice itself is kept already
        for path in add_outcome(stage.study.folder, message, show):
            if stage.study.bucket:
                stage.study.bucket.upload(path, path.name)


def _trained(stage: Study, places: Sequence[Sequence[int]]) -> bool:
    ended = {row.number for row in stage.rows if row.finished}
    return ended.issuperset(number for numbers in places for number in numbers)


def stage_config(study: Study, plan: Sequence[Settings], trials: int, means: Means) -> StudyConfig:
    """The study's own settings, but for what a plan does without: each is trained to the end, and its weights stay."""
    names = set(TrialConfig().to_dict())
    given = {name: value for name, value in asdict(means).items() if name in names}
    shared = TrialConfig.from_dict({k: v for k, v in study.record["settings"].items() if k in names} | given)
    return StudyConfig(
        preset=study.record["preset"],
        name=NAME,
        storage=_root(study),
        trials=trials,
        keep=len(plan),
        first_rung=1.0,
        trial=shared,
        **{name: value for name, value in asdict(means).items() if name not in given},
    )


def _require_same_data(study: Study, config: StudyConfig) -> None:
    """Raises StudyError with the difference: trainings on other data would not compare with the study's trials."""
    data, _ = data_of(study, config.data_dir, config.external_dir)
    was, now = study.record["data"], {**data.fingerprint, "external_name": data.external_name}
    changes = [f"  data.{key}: {was.get(key)!r} -> {value!r}" for key, value in now.items() if was.get(key) != value]
    if changes:
        raise StudyError(
            f"study {study.name!r} was trained on other data:\n" + "\n".join(changes) + "\n"
            "Finalists must be trained on the same: name its folders with --data-dir and --external-dir."
        )


def value_of(row: Row, by: str) -> float | None:
    """A run's figure; None for one that was not trained to the end."""
    return metric(row, by) if row.state == "COMPLETE" else None
