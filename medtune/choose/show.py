"""`medtune choose` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medtune.choose.hindsight import ENOUGH, USES
from medtune.evidence.intervals import in_words
from medtune.progress import brief, some
from medtune.results import GROUPS


def print_choice(choice: Mapping[str, Any]) -> None:
    """The answer first, then the finalists, the threshold, the figures, what the external test says in hindsight."""
    chosen = choice["finalists"][0]
    config, run = chosen["config"], chosen["runs"][choice["chosen"]["run"]]
    print(f"chosen: trial {chosen['trial']} of study {choice['study']}")
    print(f"  {brief({'model': config['model'], **chosen['settings']})}")
    print(f"  why: {choice['chosen']['why']}")
    if choice["ties"]:
        print(f"  TIED: {choice['ties']}")
    print(f"  to deploy: its run of seed {run['seed']}, the best on val; weights in {run['folder']}/checkpoints")
    _print_finalists(choice)
    _print_threshold(choice)
    for split, found in choice["figures"].items():
        _print_figures(GROUPS[split], found)
        if without := found.get("without_leaked"):
            _print_figures(f"{GROUPS[split]}, without near-duplicates of the training set", without)
    print(f"external set: {choice['external_set']}" + (f"; {choice['audit']}" if choice["audit"] else ""))
    _print_hindsight(choice)
    for caution in choice["cautions"]:
        print(f"CAUTION: {caution}")


def _print_finalists(choice: Mapping[str, Any]) -> None:
    labels = " (EXTERNAL LABELS)" if choice["external_labels_used"] else ""
    count = f"{len(choice['finalists'])} of {some(choice['candidates'], 'trial')} trained to the end"
    print(f"finalists by {choice['by']}{labels}, {count}:")
    for one in choice["finalists"]:
        mean = "no run was trained to the end"
        if one["mean"] is not None:
            mean = f"mean {one['mean']:.4f}{_range(one, 4)} over {some(len(one['runs']), 'seed')}"
            mean += f", {one['first_value']:.4f} in the study"
        compared = ", ".join(f"p {p:.3f} ({name})" for name, p in one["p_corrected"].items() if p is not None)
        against = f"; {'tied with the first' if one['tied'] else 'worse than the first'}: {compared}" if compared else ""
        print(f"  {one['rank']}. trial {one['trial']}: {mean}{against}")


def _print_threshold(choice: Mapping[str, Any]) -> None:
    threshold = choice["threshold"]
    if threshold:
        print(f"threshold: {threshold['value']:.4f} by {threshold['rule']}, set on val, on calibrated probabilities")
    print(f"temperature: {choice['temperature']:.3f}, fitted on val")


def _print_figures(label: str, found: Mapping[str, Any]) -> None:
    print(f"{label}, {found['n']} images")
    for kind, name in (("at_threshold", "at the threshold"), ("argmax", "most probable class")):
        if found[kind]:
            print(f"  {name}: " + "   ".join(_figure(key, value) for key, value in found[kind].items()))
    before, after = found["before"], found["after"]
    both = (f"{_figure(key, before[key])} -> {in_words(after[key])}" for key in ("ece", "brier"))
    print(f"  calibration, before -> after: {'   '.join(both)}")


def _print_hindsight(choice: Mapping[str, Any]) -> None:
    print(f"in hindsight, rank correlations with the external test (+1: the better is always the better there); this {USES}")
    for one in choice["correlations"]:
        rho = "undefined" if one["rho"] is None else f"{one['rho']:+.2f}{_range(one, 2)}"
        few = ": too few" if one["n"] < ENOUGH else ""
        print(f"  {one['selection']} with {one['with']}: {rho}, n {one['n']} of {one['over']}{few}")


def _figure(name: str, value: Mapping[str, Any]) -> str:
    return f"{name} {in_words(value)}"


def _range(value: Mapping[str, Any], digits: int) -> str:
    low, high = value["low"], value["high"]
    return "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
