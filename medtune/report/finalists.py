"""ROC and reliability of the finalists, on val and on the external set, with what chance leaves open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medtune import metrics, predictions
from medtune.errors import StudyError
from medtune.evidence.calibration import calibrated, reliability
from medtune.metrics import Array
from medtune.predictions import Predicted, Predictions
from medtune.report.answer import leaks
from medtune.report.parts import COLOURS, DASHES, GREY, Block, Plot, Section, Words, axis, band, line, points
from medtune.report.source import Source
from medtune.results import Study, predicted
from medtune.storage.copies import fetch_records
from medtune.storage.patience import reason

MOST = 3
RESAMPLES = 200
BINS = 10
SPLITS = ("val", "external")
SYMBOLS = ("circle", "square", "diamond")
GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Finalist:
    """A training that is drawn."""

    name: str
    predictions: Predictions
    temperature: float | None = None
    """Of the one to deploy: fitted on val."""


def finalists(source: Source) -> Section:
    """The section; in words alone where no logits are kept."""
    title = "The finalists, image by image"
    try:
        found = list(_chosen(source, source.choice) if source.choice else _best(source))
    except StudyError as error:
        return Section("finalists", title, [Words(f"Not drawn: {error}", "loud")])
    if not found:
        return Section("finalists", title, [Words("No trial was trained to the end with its logits kept: nothing to draw.")])
    blocks: list[Block] = []
    if not source.choice:
        text = "These are the best of the search by val, each trained once; `medtune choose` makes finalists of them."
        blocks += [Words(text)]
    for split in SPLITS:
        there = [one for one in found if split in one.predictions]
        blocks += [*(leaks(source) if split == "external" else []), *_plots(source, split, there)]
    return Section("finalists", title, blocks)


def _best(source: Source) -> Iterator[Finalist]:
    for row in source.complete[:MOST]:
        logits = predicted(source.study, row)
        if logits:
            yield Finalist(f"trial {row.number}", logits)


def _chosen(source: Source, choice: Mapping[str, Any]) -> Iterator[Finalist]:
    """The weights to deploy, and of each other finalist the run that is best on val."""
    chosen = choice["chosen"]
    trained = [one for one in choice["finalists"] if one["runs"]]
    for one in sorted(trained, key=lambda one: (one["trial"] != chosen["trial"], one["rank"]))[:MOST]:
        deployed = one["trial"] == chosen["trial"]
        values = [run["value"] for run in one["runs"]]
        place = chosen["run"] if deployed else values.index((min if source.minimises(choice["by"]) else max)(values))
        run = one["runs"][place]
        logits = _logits(source.study, run["folder"])
        if logits:
            name = f"trial {one['trial']}, seed {run['seed']}"
            yield Finalist(name + (" (chosen)" if deployed else ""), logits, choice.get("temperature") if deployed else None)


def _logits(study: Study, folder: str) -> Predictions | None:
    if study.bucket:
        try:
            fetch_records(study.bucket, study.folder, folder)
        except OSError as error:
            raise StudyError(f"cannot read {folder} in {study.where}: {reason(error)}") from None
    return predictions.read(study.folder / folder)


def _plots(source: Source, split: str, found: Sequence[Finalist]) -> Iterator[Plot | Words]:
    label = source.split(split)
    drawn = [one for one in found if len(one.predictions[split].labels)]
    if not drawn:
        yield Words(f"No logits of {label}.")
        return
    labels = drawn[0].predictions[split].labels
    classes = drawn[0].predictions[split].logits.shape[1]
    missing = metrics.undefined(labels, classes).get("auc")
    if missing:
        yield Words(f"No ROC curve of {label}: {missing}.")
    else:
        yield _roc(source, split, label, drawn, classes)
    yield _reliability(source, split, label, drawn, classes)


# --- ROC ------------------------------------------------------------------------------------------------------------


def _roc(source: Source, split: str, label: str, found: Sequence[Finalist], classes: int) -> Plot:
    traces: list[dict[str, Any]] = []
    for place, one in enumerate(found):
        at = one.predictions[split]
        probs = metrics.softmax(at.logits)
        low, high = roc_band(probs, at.labels)
        auc = metrics.classification(probs, at.labels)["auc"]
        traces.append(band(GRID.tolist(), low.tolist(), high.tolist(), COLOURS[place]))
        x, y = _curve(probs, at.labels, classes)
        traces.append(line(x, y, f"{one.name}: AUC {auc:.3f}", COLOURS[place], DASHES[place]))
    traces.append(line([0, 1], [0, 1], "chance", GREY, "dot", hoverinfo="skip", thick=1.3))
    ways = "" if classes == 2 else f" The mean of {classes} curves, each of one class against the rest."
    count = len(found[0].predictions[split].labels)
    return Plot(
        f"roc-{split}", f"ROC, {label}",
        f"Share of positives found against share of false alarms at every threshold, on {count} images of "
        f"{_set(source, split)}; the bands hold 95 % of {RESAMPLES} resamples of the images.{ways}",
        "The bands are of the choice of images alone: another training of the same settings moves the curve too.",
        traces,
        {
            "xaxis": axis("1 - specificity", range=[-0.01, 1.01], constrain="domain"),
            "yaxis": axis("sensitivity", range=[-0.01, 1.01]),
        },
        height=420,
    )  # fmt: skip


def _curve(probs: Array, labels: Any, classes: int) -> tuple[list[float], list[float]]:
    if classes == 2:
        found = metrics.roc(probs, labels)
        return found["fpr"], found["tpr"]
    ones = np.ones((1, len(labels)))
    return GRID.tolist(), np.mean([_sensitivities(probs, labels, k, ones)[0] for k in range(classes)], axis=0).tolist()


def roc_band(probs: Array, labels: Any, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Array, Array]:
    """Sensitivity at each false-alarm share of `GRID`: the bounds of 95 % of the resamples, each (101,).

    probs (N, K), labels (N,) with every class among them; of more than two classes the mean of each against the rest.
    """
    drawn = metrics.resample_indices(labels, resamples, seed)
    counts = np.stack([np.bincount(one, minlength=len(labels)) for one in drawn]).astype(float)
    positives = [1] if probs.shape[1] == 2 else list(range(probs.shape[1]))
    curves = np.mean([_sensitivities(probs, labels, positive, counts) for positive in positives], axis=0)
    low, high = np.percentile(curves, (2.5, 97.5), axis=0)
    return low, high


def _sensitivities(probs: Array, labels: Any, positive: int, counts: Array) -> Array:
    """(R, 101) at `GRID`, of images counted (R, N) times: of equal probabilities, the corners alone count."""
    order = np.argsort(-probs[:, positive], kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probs[order, positive])), len(order) - 1)
    truth = np.asarray(labels)[order] == positive
    drawn = counts[:, order]
    found, alarms = (np.cumsum(drawn * kind, axis=1)[:, ends] for kind in (truth, ~truth))
    start = np.zeros((len(counts), 1))
    tpr = np.hstack([start, found / found[:, -1:]])
    fpr = np.hstack([start, alarms / alarms[:, -1:]])
    return np.stack([np.interp(GRID, x, y) for x, y in zip(fpr, tpr, strict=True)])


# --- reliability ----------------------------------------------------------------------------------------------------


def _reliability(source: Source, split: str, label: str, found: Sequence[Finalist], classes: int) -> Plot:
    traces = [line([0, 1], [0, 1], "taken at its word", GREY, "dot", hoverinfo="skip", thick=1.3)]
    for place, one in enumerate(found):
        at = one.predictions[split]
        traces.append(_diagram(at, 1.0, one.name, COLOURS[place], SYMBOLS[place]))
        if one.temperature:
            colour = COLOURS[len(found)]
            traces.append(_diagram(at, one.temperature, f"{one.name}, temperature {one.temperature:.2f}", colour, "star"))
    what = "probability of the positive class" if classes == 2 else "probability of the class that was decided"
    return Plot(
        f"calibration-{split}", f"Calibration, {label}",
        f"Mean {what} of each tenth of the scale against the share that was so, on {_set(source, split)}, with 95 % "
        "intervals (Wilson); below the dotted line the model was too sure.",
        "Bins with few images have wide intervals; a set with another share of positives moves the marks.",
        traces,
        {
            "xaxis": axis(what, range=[-0.02, 1.02]),
            "yaxis": axis("share that was so", range=[-0.02, 1.02]),
        },
        height=420,
    )  # fmt: skip


def _diagram(at: Predicted, temperature: float, name: str, colour: str, symbol: str) -> dict[str, Any]:
    found = reliability(calibrated(at.logits, temperature), at.labels, BINS)
    there = np.flatnonzero(found.images)
    y = found.observed[there]
    error = {
        "type": "data", "symmetric": False, "color": colour, "thickness": 1.3,
        "array": (found.high[there] - y).tolist(), "arrayminus": (y - found.low[there]).tolist(),
    }  # fmt: skip
    told = [f"{int(count)} images" for count in found.images[there]]
    x = found.confidence[there].tolist()
    more = {"mode": "lines+markers", "error_y": error, "text": told, "line": {"color": colour}}
    return points(x, y.tolist(), name, colour, symbol, **more)


def _set(source: Source, split: str) -> str:
    return source.external_name if split.startswith("external") else source.split(split)
