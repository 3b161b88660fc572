"""What is exported: the run that `medtune choose` named, else the best trial, or the one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtune.audit import verdict_of
from medtune.choose import read_choice
from medtune.choose.deployed import decision, rule_of
from medtune.choose.stage import open_stage
from medtune.config import TrialConfig
from medtune.data import PairData, limit
from medtune.errors import BundleError, ConfigError, DataError, StudyError, unknown
from medtune.evidence.threshold import Rule
from medtune.predictions import Predictions
from medtune.results import Study, checkpoint, data_of, predicted, rank
from medtune.search.ledger import Row
from medtune.weights import load_weights


@dataclass(frozen=True, eq=False)
class Source:
    """Weights to deploy, with what is known of them."""

    study: Study
    trial: int
    """The trial of the study whose configuration this is."""
    config: TrialConfig
    weights: dict[str, Any]
    predictions: Predictions
    why: str
    cautions: tuple[str, ...]
    decided: dict[str, Any]
    """`temperature`, `threshold` and `figures`, as in choice.json."""
    run: dict[str, Any] | None = None
    """Which training of the choice it is; none: the trial's own."""


def find(study: Study, trial: int | None, threshold: str | None) -> Source:
    """What to export. Raises StudyError or ConfigError where there is no such trial, or it left too little."""
    choice = read_choice(study) if trial is None else None
    if choice is not None:
        made_with = choice["threshold"]["rule"] if choice["threshold"] else "argmax"  # none: more than two classes
        if threshold is not None and str(Rule.parse(threshold)) != made_with:
            raise ConfigError(
                f"--threshold {threshold}: the choice was made with {made_with}. Leave it out, or choose anew with "
                f"medtune choose {study.name} --threshold {threshold}"
            )
        return _chosen(study, choice)
    row = row_of(study, trial)
    if trial is None:
        why = f"best of the trials trained to the end by {study.selection}; not retrained: medtune choose was not run"
    else:
        why = "named by hand at export"
    caution = f"One training of one seed: how much its figures vary is not known. `medtune choose {study.name}` tells."
    return _source(study, study, row, row.number, why, (caution,), threshold=threshold)


def _chosen(study: Study, choice: dict[str, Any]) -> Source:
    named = choice["chosen"]
    finalist = next(one for one in choice["finalists"] if one["trial"] == named["trial"])
    run = finalist["runs"][named["run"]]
    stage = open_stage(study)
    if stage is None:
        raise StudyError(f"the trainings that medtune choose made of study {study.name!r} are gone: run it again")
    row = next(row for row in stage.rows if row.number == run["number"])
    cautions = tuple(filter(None, [choice["ties"], *choice["cautions"]]))
    decided = {name: choice[name] for name in ("temperature", "threshold", "figures")}
    about = {"seed": run["seed"], "number": run["number"], "of": len(finalist["runs"])}
    return _source(study, stage, row, named["trial"], named["why"], cautions, decided=decided, run=about)


def _source(
    study: Study,
    kept: Study,
    row: Row,
    trial: int,
    why: str,
    cautions: tuple[str, ...],
    *,
    threshold: str | None = None,
    decided: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
) -> Source:
    """`kept`: the study that the row is of, the stage of a choice or the study itself."""
    path, found = checkpoint(kept, row), predicted(kept, row)
    if path is None:
        raise StudyError(f"the weights of trial {trial} of study {study.name!r} were not kept (see --keep): name another")
    if found is None:
        raise StudyError(f"trial {trial} of study {study.name!r} left no predictions: an older medtune trained it")
    weights, about = load_weights(path)
    assert about is not None, "the trial's own checkpoint"
    if decided is None:
        leaked = (verdict_of(study) or {}).get("external_leaked", ())
        decided = decision(found, rule_of(threshold, found["val"].logits.shape[1]), leaked)
    return Source(study, trial, TrialConfig.from_dict(about["config"]), weights, found, why, cautions, decided, run)


def row_of(study: Study, trial: int | None) -> Row:
    """A trial that was trained to the end, by default the best. Raises ConfigError, or StudyError where there is none."""
    if trial is None:
        ranked = rank(study, study.selection)
        if not ranked:
            raise StudyError(f"no trial of study {study.name!r} was trained to the end yet: nothing to export")
        return ranked[0]
    rows = {row.number: row for row in study.rows}
    if trial not in rows:
        raise ConfigError(unknown(f"trial of study {study.name!r}", str(trial), map(str, rows)))
    if rows[trial].state != "COMPLETE":
        state = study.state(rows[trial])
        raise StudyError(f"trial {trial} of study {study.name!r} is {state}: only one trained to the end is exported")
    return rows[trial]


def images_of(source: Source, data_dir: Path | None, external_dir: Path | None) -> PairData:
    """The images that the study was made with. Raises DataError where they are missing or are others."""
    config, record = source.config, source.study.record["data"]
    data, other = data_of(source.study, data_dir, external_dir)
    if other:
        raise DataError(
            f"the {' and '.join(other)} images here are not those of study {source.study.name!r} "
            f"(external: {data.external_name}, there {record['external_name']}): name its folders with --data-dir and "
            "--external-dir"
        )
    if any(len(split.labels) == 0 for split in (data.train, data.val, data.external)):
        raise BundleError("a bundle needs images to train, validate and test on; one of these sets is empty")
    return limit(data, train_limit=config.train_limit, external_limit=config.external_limit)
