"""The answer first: which configuration, on what evidence, and what must be known before it is deployed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medtune.audit.verdict import sentence
from medtune.progress import brief, duration, some
from medtune.report.parts import Section, Table, Words, three, within
from medtune.report.source import Source
from medtune.results import GROUPS, OPTIMISTIC, SYNTHETIC, best

FEW = 20
"""Trials trained to the end, fewer than which are called few."""
WIDE = 0.1
"""An interval of the AUC wider than this is called wide."""
SHOWN = {"oa": "OA", "sensitivity": "sensitivity", "specificity": "specificity", "f1": "F1", "auc": "AUC"}


def answer(source: Source) -> Section:
    """The first section of the page."""
    if source.choice:
        found = _chosen(source, source.choice)
    elif source.complete:
        found = _best(source)
    else:
        found = [Words(_nothing_yet(source))]
    # What must be known stands before the figures that it bears on.
    tables = [block for block in found if isinstance(block, Table)]
    words = [block for block in found if isinstance(block, Words)]
    return Section("answer", "The answer", [*words, *cautions(source), *tables])


def _nothing_yet(source: Source) -> str:
    if not source.study.rows:
        return "There is no trial yet, so there is nothing to choose from."
    more = "The study is running: this page is written again while it does." if source.running else (
        "The script's command goes on with it."
    )
    return f"No trial was trained to the end yet, so there is nothing to choose from. {more}"


def _best(source: Source) -> list[Words | Table]:
    """What `medtune best` answers."""
    found = best(source.study)
    trial = found["trials"][0]
    config = trial["config"]
    return [
        Words(f"Trial {trial['number']}: {brief({'model': config['model'], **trial['params']})}", "verdict"),
        Words(
            f"Best of {some(found['of'], 'trial')} trained to the end by {found['ranked_by']} = "
            f"{trial['ranked_value']:.4f}; {config['image_size']} px, batch {config['batch_size']}, best epoch "
            f"{trial['best'].get('epoch')} of {config['epochs']}, seed {config['seed']}, trained for "
            f"{duration(trial['seconds'])}."
        ),
        Words(
            f"Not yet retrained on other seeds: one training decides little. `medtune choose {source.study.name}` trains "
            "the best few again and says whether they can be told apart.",
            "loud",
        ),
        _figures(source, {**trial["best"], **trial["external"]}),
    ]


def _figures(source: Source, figures: Mapping[str, Any]) -> Table:
    rows = []
    for group, label in GROUPS.items():
        if f"{group}/oa" in figures and not (group.startswith("external") and source.external == "cpn"):
            values = (_figure(figures, f"{group}/{name}") for name in SHOWN)
            rows.append([label, *values])
    external = f"External set: {source.external_name}" + (
        f", {figures['external/n']} images" if "external/n" in figures else ""
    )
    return Table(
        f"Figures with 95 % intervals from resampled images; they do not contain the spread between trainings. {external}. "
        "Decision: the more probable class.",
        ["measured on", *SHOWN.values()],
        rows,
    )


def _figure(figures: Mapping[str, Any], key: str) -> str:
    if figures.get(key) is None:
        return f"undefined ({figures[f'{key}/reason']})" if f"{key}/reason" in figures else "-"
    return within(figures[key], figures.get(f"{key}/low"), figures.get(f"{key}/high"))


# --- after `medtune choose` -----------------------------------------------------------------------------------------


def _chosen(source: Source, choice: Mapping[str, Any]) -> list[Words | Table]:
    chosen = choice["chosen"]
    finalist = next(one for one in choice["finalists"] if one["trial"] == chosen["trial"])
    run = finalist["runs"][chosen["run"]]
    model = finalist["config"]["model"]
    tables = [_finalists(choice)]
    if choice.get("figures"):
        tables += [_decisions(source, choice), _calibration(source, choice)]
    return [
        Words(f"Trial {chosen['trial']}: {brief({'model': model, **finalist['settings']})}", "verdict"),
        Words(
            f"Why: {chosen['why']}. Chosen by {choice['by']} among {some(choice['candidates'], 'trial')} trained to the "
            f"end; {some(len(choice['finalists']), 'finalist')} trained again from "
            f"{some(len(choice['seeds']), 'other seed')}: mean "
            f"{within(finalist['mean'], finalist['low'], finalist['high'])}. "
            f"The weights to deploy are those of seed {run['seed']}."
        ),
        *([Words(f"Ties: {choice['ties']}", "loud")] if choice.get("ties") else []),
        *tables,
    ]


def _finalists(choice: Mapping[str, Any]) -> Table:
    ordered = sorted(choice["finalists"], key=lambda one: one["rank"])
    rows = [
        [
            f"trial {one['trial']}",
            str(one["rank"]) + (" (tied with the first)" if one["tied"] and one["rank"] > 1 else ""),
            within(one["mean"], one["low"], one["high"]),
            " ".join(three(run["value"]) for run in one["runs"]),
            three(one["first_value"]),
            brief({"model": one["config"]["model"], **one["settings"]}),
        ]
        for one in ordered
    ]
    strong = frozenset(i for i, one in enumerate(ordered) if one["trial"] == choice["chosen"]["trial"])
    heads = ["finalist", "rank", f"mean {choice['by']}", "each seed", "in the search", "settings"]
    caption = "Finalists, each trained again from scratch on other seeds; mean with its 95 % interval over seeds."
    return Table(caption, heads, rows, strong=strong)


def _decisions(source: Source, choice: Mapping[str, Any]) -> Table:
    threshold = choice.get("threshold") or {}
    ways = {"argmax": "the more probable class"}
    if threshold:
        value = threshold["value"]
        shown = f"from {value:.3f} on" if value <= 1 else "no image's"
        ways["at_threshold"] = f"{shown} ({threshold['rule']}, set on {threshold['set_on']})"
    rows = [
        [label, words, *(_interval(found[way].get(name)) for name in SHOWN)]
        for label, found in _measured(source, choice)
        for way, words in ways.items()
        if found.get(way)
    ]
    caption = (
        "The weights to deploy, by what calls an image positive. The report's own decision is the more probable class; "
        f"external set: {source.external_name}."
    )
    return Table(caption, ["measured on", "positive", *SHOWN.values()], rows)


def _calibration(source: Source, choice: Mapping[str, Any]) -> Table:
    columns = [(name, when) for name in ("ece", "brier") for when in ("before", "after")]
    rows = [
        [label, *(_interval((found.get(when) or {}).get(name)) for name, when in columns)]
        for label, found in _measured(source, choice)
    ]
    temperature = choice.get("temperature")
    caption = (
        f"How far the probabilities can be taken at their word, before and after temperature scaling on val"
        f"{f' (temperature {temperature:.3f})' if temperature else ''}; less is better. ECE: expected calibration error."
    )
    return Table(caption, ["measured on", "ECE before", "after", "Brier before", "after"], rows)


def _measured(source: Source, choice: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each split in words with its figures; the external set once more without what leaked."""
    for split, found in choice["figures"].items():
        yield source.split(split), found
        if found.get("without_leaked"):
            yield f"{source.split(split)}, without near-duplicates of the training set's", found["without_leaked"]


def _interval(found: Mapping[str, Any] | float | None) -> str:
    if found is None:
        return "-"
    return within(found["value"], found.get("low"), found.get("high")) if isinstance(found, Mapping) else three(found)


# --- what must be known ---------------------------------------------------------------------------------------------


def cautions(source: Source) -> Iterator[Words]:
    """What bears on every figure of the page, the gravest first."""
    record, choice = source.study.record, source.choice or {}
    if record["synthetic"]:
        yield Words(SYNTHETIC.strip(), "loud")
    if choice.get("external_labels_used"):
        yield Words(OPTIMISTIC, "loud")
    if not record["verified_cpn"]:
        yield Words(f"The external set is not CPN X-ray, but {source.external_name}.", "loud")
    yield from leaks(source)
    if source.running:
        yield Words("The study is running: what follows may change.", "loud")
    # The choice's own cautions begin with what was said above.
    more = [text for text in choice.get("cautions", ()) if text != OPTIMISTIC and text != SYNTHETIC.strip()]
    yield from (Words(text) for text in (*more, *_small(source)))


def leaks(source: Source) -> list[Words]:
    """What is known of images that are in several sets; it stands beside every external figure."""
    found = source.audit
    said = sentence(source.study)
    clean = found is not None and not found["external_leaked"]
    return [Words(f"External set: {said}", "" if clean else "loud")] if said else []


def _small(source: Source) -> Iterator[str]:
    complete = source.complete
    if 0 < len(complete) < FEW:
        yield f"Few trials: {len(complete)} trained to the end. The best of few is not far from a lucky one."
    if complete and (width := _width(complete[0].latest.get("external", {}), source.external)) > WIDE:
        yield f"The external AUC of the best trial is known to within {width:.2f} only (95 % interval)."


def _width(figures: Mapping[str, Any], prefix: str) -> float:
    low, high = figures.get(f"{prefix}/auc/low"), figures.get(f"{prefix}/auc/high")
    return 0.0 if low is None or high is None else high - low

