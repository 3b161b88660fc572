"""What is said around the tables: in what ours is another experiment, which trials count, how to read the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from medtune import recipes, reference
from medtune.audit import sentence
from medtune.audit.words import LEAKED
from medtune.compare.match import SECTIONS, Trial, matches
from medtune.config import TrialConfig
from medtune.results import Study

_DIFFERENCES: tuple[tuple[Callable[[TrialConfig], Any], Callable[[TrialConfig], bool], str, str], ...] = (
    (lambda c: c.image_size, lambda c: c.image_size == reference.IMAGE_SIZE, "{} px", "224 px"),
    (
        lambda c: c.epochs,
        lambda c: c.epochs in reference.RECIPES[c.model].epochs,
        "{} epochs",
        "150 epochs, MedViT 100, ResNet50 either",
    ),
    (lambda c: _train_images(c), lambda c: _train_images(c) == "all", "{} training images", "all 4708"),
    (
        lambda c: c.batch_size,
        lambda c: c.batch_size in reference.RECIPES[c.model].batch_size,
        "batch {}",
        "batch 64, MedViT 128, ResNet50 either",
    ),
    (lambda c: c.native_size, lambda c: c.native_size == reference.NATIVE_SIZE, "files of {} px", "files of 28 px"),
    (lambda c: c.pair, lambda c: c.pair == "pneumoniamnist-cpn", "trained on {}", "PneumoniaMNIST"),
)
"""What may differ from the report's recipe: our value, whether it is the report's, ours and theirs in words."""


def loud(study: Study, trials: Sequence[Trial]) -> list[str]:
    """What makes ours another experiment than the report's."""
    configs = [trial.config for trial in trials]
    ours, theirs = [], []
    for value, fits, words, report in _DIFFERENCES:
        if not all(map(fits, configs)):
            ours.append(words.format(_either({value(config) for config in configs})))
            theirs.append(report)
    lines = [] if configs else ["No trial of this study has a setting of the report."]
    if ours:
        lines.append(f"Ours at {', '.join(ours)}: not comparable, shows the way. (The report: {'; '.join(theirs)}.)")
    if not study.record["verified_cpn"]:
        lines.append(f"Ours in Tables 5 and 7.3 are NOT on CPN X-ray, but on {study.record['data']['external_name']}.")
    if (leaks := sentence(study)) and leaks.startswith(LEAKED):
        lines.append(f"The external images: {leaks}.")
    return lines


def _train_images(config: TrialConfig) -> int | str:
    limit = config.train_limit
    return limit if limit is not None and limit < reference.TRAIN_IMAGES else "all"


def _either(values: Iterable[Any]) -> str:
    return " or ".join(map(str, sorted(values, key=lambda value: (isinstance(value, str), value))))


def quiet(study: Study, trials: Sequence[Trial]) -> list[str]:
    lines = [
        "Ours: mean over trials trained to the end (their seeds differ), lowest and highest; difference: our mean less "
        "the report's figure. The report's is one run a row.",
        "AUC: ours is the area under the ROC curve by probability; the report's scripts ranked by the raw logit of class 1.",
    ]
    if (leaks := sentence(study)) and not leaks.startswith(LEAKED):
        lines.append(f"The external images: {leaks}.")
    if study.selection != recipes.SELECTION:
        lines.append(f"Best weights: ours by {study.selection}, the report's by val accuracy.")
    # A set with fewer images than the limit was tested in full.
    tested = ((trial.config.external_limit, trial.figures.get("external/n")) for trial in trials)
    limits = {limit for limit, count in tested if limit and limit == count}
    if limits:
        lines.append(f"External test: ours on a fixed stratified choice of {_either(limits)} images.")
    uneven = _uneven(trials)
    if uneven:
        lines.append(f"Trials of one setting that differ in more than the seed: {'; '.join(uneven)}.")
    return lines


def _uneven(trials: Sequence[Trial]) -> list[str]:
    """Settings whose replicates are none, by the settings that differ."""
    found = []
    names = ("image_size", "epochs", "batch_size", "train_limit", "native_size", "precision", "clip_norm")
    for row in (*reference.table("3"), *reference.table("7.1")):
        for schedule in SECTIONS:
            same = [t.config for t in trials if t.config.schedule == schedule and matches(t.config, row)]
            differing = [n for n in names if len({getattr(config, n) for config in same}) > 1]
            if differing:
                found.append(f"{reference.MODELS[row.model]} ({row.describe()}) in {', '.join(differing)}")
    return found


def account(trials: Sequence[Trial], counted: Sequence[Trial]) -> list[str]:
    """One line for each kind of trial: nothing is dropped in silence."""
    inside = {trial.row.number for trial in counted}
    here: list[Trial] = []
    elsewhere: list[Trial] = []
    for trial in trials:
        if trial.state == "COMPLETE":
            (here if trial.row.number in inside else elsewhere).append(trial)
    lines = [
        _count("trained to the end, at settings of the report", here),
        _count("trained to the end, at other settings (not shown)", elsewhere),
    ]
    for state in sorted({trial.state for trial in trials} - {"COMPLETE"}):
        those = [trial for trial in trials if trial.state == state]
        count = sum(trial.row.number in inside for trial in those)
        lines.append(_count(f"{state}: not counted ({count} of them at settings of the report)", those))
    lines += [f"trial {trial.row.number} failed: {trial.row.cause}" for trial in counted if trial.state == "FAIL"]
    lines += [f"trial {trial.row.number}: {trial.problem}" for trial in counted if trial.problem]
    return [line for line in lines if line] or ["no trials yet"]


def _count(what: str, trials: Sequence[Trial]) -> str:
    return f"{len(trials)} {what}: {_numbers([trial.row.number for trial in trials])}" if trials else ""


def _numbers(numbers: Sequence[int]) -> str:
    """`0-3, 5`: runs of neighbours are drawn together."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


FOOTNOTES = {
    "a": "Printed as 0.947; Table 3 has 0.9446 for the same figure.",
    "b": "The authors' OA and AUC are printed swapped (published: AUC 0.991, OA 0.921); shown, and the difference "
    "taken, as printed.",
    "c": "The authors' figures repeat MedMamba-b's, swapped; shown, and the difference taken, as printed.",
    "d": "The report's scripts never stepped the schedule and set no seed: gamma had no effect, so its rows that differ in "
    "gamma alone are replicates of one setting (for Adam at lr 0.001 that of Tables 3 to 5), and their spread is "
    "run-to-run noise. Ours as run repeat each other where their seeds are the same; ours with the schedule stepped are "
    "another experiment.",
}
"""What is to be known about rows of the report, by their mark."""
