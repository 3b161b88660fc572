"""A choice from what was trained: the finalists in order, the one to deploy, its threshold, and what must be known of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from medtune.audit import sentence, verdict_of
from medtune.choose.deployed import NEVER, decision
from medtune.choose.hindsight import RUNS, correlations
from medtune.choose.ranking import LEVEL, Compared, Finalist, compare, finalists_of
from medtune.choose.stage import NAME, STAGES, Stage, settings_of
from medtune.evidence.threshold import Rule
from medtune.models.cost import cost
from medtune.progress import brief, some
from medtune.results import OPTIMISTIC, Study, metric, optimistic, trial_config
from medtune.search.conductor import attempt_folder, minimised
from medtune.search.ledger import Row

FEW_SEEDS = 3


def choice(study: Study, stage: Stage, trials: Sequence[Row], by: str, rule: Rule) -> dict[str, Any]:
    """What `choice.json` holds, in plain values.

    | key          | holds                                                                                       |
    | ------------ | ------------------------------------------------------------------------------------------- |
    | by, external_labels_used, candidates, seeds | the metric, whether it saw external labels, trials considered, seeds |
    | external_set, audit | what was tested on, and `medtune.audit.sentence` on it                                 |
    | finalists    | best first: trial, settings, config, its runs, mean, low, high, rank, tied, p_corrected      |
    | chosen, ties | trial, index of its run whose weights are deployed, why; ties in words                       |
    | threshold, temperature, figures | of that run (`medtune.choose.deployed`)                                   |
    | correlations | `medtune.choose.hindsight`: uses external labels, and had no part in the choice              |
    | cautions     | in words                                                                                     |
    """
    ranked = finalists_of(trials, stage, by)
    compared = compare(ranked, by)
    first = ranked[0]
    tied = [one for one, against in zip(ranked[1:], compared, strict=False) if against.tied]
    run = _run_to_deploy(first, study.selection if optimistic(by) else by)
    found = decision(first.predictions[run], rule, (verdict_of(study) or {}).get("external_leaked"))
    return {
        "study": study.name,
        "created": time.time(),
        "by": by,
        "external_labels_used": optimistic(by),
        "external_set": study.record["data"]["external_name"],
        "audit": sentence(study),
        "synthetic": study.record["synthetic"],
        "candidates": sum(row.state == "COMPLETE" for row in study.rows),
        "seeds": stage.seeds,
        "finalists": [
            _described(study, one, by, rank, against)
            for rank, (one, against) in enumerate(zip(ranked, _padded(compared, len(ranked)), strict=True), 1)
        ],
        "chosen": {"trial": first.trial.number, "run": run, "why": _why(study, first, tied, by, len(ranked))},
        "ties": _ties(study, first, tied, compared),
        **found,
        "correlations": [
            *correlations(study.rows, "the study's trials"),
            *correlations(stage.study.rows, RUNS),
        ],
        "cautions": _cautions(study, ranked, stage, by, found),
    }


def _padded(compared: Sequence[Compared], count: int) -> list[Compared | None]:
    """One for each finalist: None for the first, and for those without a run, which come last."""
    return [None, *compared, *[None] * (count - 1 - len(compared))]


def _described(study: Study, one: Finalist, by: str, rank: int, against: Compared | None) -> dict[str, Any]:
    low, high = one.interval() or (None, None)
    return {
        "trial": one.trial.number,
        "settings": settings_of(study, one.trial),
        "config": trial_config(study, one.trial).to_dict(),
        "first_value": metric(one.trial, by),
        "runs": [_run(study, row, value, by) for row, value in zip(one.runs, one.values, strict=True)],
        "failed": [{"number": row.number, "cause": row.cause} for row in one.failed],
        "mean": one.mean if one.runs else None,
        "low": low,
        "high": high,
        "rank": rank,
        "tied": against is not None and against.tied,
        "p_corrected": {} if against is None else {by: against.images, f"{by} over seeds": against.seeds},
    }


def _run(study: Study, row: Row, value: float, by: str) -> dict[str, Any]:
    folder = attempt_folder(study.folder / STAGES / NAME / "trials", row.number, row.attempt)
    return {
        "seed": (row.settings or {})["seed"],
        "number": row.number,
        "value": value,
        "figures": {**row.latest.get("external", {}), **row.latest.get("best", {})},
        "folder": str(folder.relative_to(study.folder)),
    }


def _run_to_deploy(first: Finalist, by: str) -> int:
    """The run that is best on val: external labels have no part in this."""
    values = [metric(row, by) for row in first.runs]
    sign = 1 if minimised(by) else -1
    return min(range(len(values)), key=lambda i: float("inf") if values[i] is None else sign * values[i])  # type: ignore[operator]


def _named(study: Study, one: Finalist) -> str:
    return f"trial {one.trial.number} ({brief(settings_of(study, one.trial))})"


def _why(study: Study, first: Finalist, tied: Sequence[Finalist], by: str, finalists: int) -> str:
    seeds = some(len(first.runs), "fresh seed")
    words = f"best mean {by} over {seeds}" if finalists > 1 else f"the only finalist, trained again from {seeds}"
    if not tied:
        return words
    words += ", though tied: the first by the mean is taken"
    config = trial_config(study, first.trial)
    own = cost(config.model, config.image_size).parameters
    for one in tied:
        other = trial_config(study, one.trial)
        parameters = cost(other.model, other.image_size).parameters
        if parameters < own:
            sizes = f"{parameters / 1e6:.1f} M parameters, not {own / 1e6:.1f} M"
            words += f"; trial {one.trial.number}'s {other.model} is smaller ({sizes})"
    return words


def _ties(study: Study, first: Finalist, tied: Sequence[Finalist], compared: Sequence[Compared]) -> str | None:
    if not tied:
        return None
    names = " and ".join(_named(study, one) for one in tied)
    pairs = len(compared) * (len(compared) + 1) // 2
    corrected = f", corrected for {pairs} comparisons" if pairs > 1 else ""
    tests = "both tests, over images and over seeds,"
    if all(against.seeds is None for against in compared):
        tests = "the test over images (a single seed allows none over seeds)"
    return f"{names}: not told apart from trial {first.trial.number} by {tests} at p {LEVEL}{corrected}"


def _cautions(
    study: Study, ranked: Sequence[Finalist], stage: Stage, by: str, found: dict[str, Any]
) -> list[str]:
    words = []
    if optimistic(by):
        words.append(OPTIMISTIC)
    if study.record["synthetic"]:
        words.append("SYNTHETIC images: these figures say nothing about any disease")
    for one in ranked:
        if one.failed:
            causes = "; ".join(sorted({str(row.cause) for row in one.failed}))
            words.append(f"trial {one.trial.number}: {len(one.failed)} of its runs were not trained to the end ({causes})")
    if len(stage.seeds) < FEW_SEEDS:
        said = "one seed says" if len(stage.seeds) == 1 else f"{len(stage.seeds)} seeds say"
        words.append(f"{said} little about how much a training varies: --seeds 5 is the default")
    if study.running:
        words.append("the study was still running: better trials may come")
    if found["threshold"] and found["threshold"]["value"] == NEVER:
        words.append(f"at the threshold of rule {found['threshold']['rule']} no image is called positive")
    return words
