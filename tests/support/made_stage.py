"""The stage of `medtune choose` put down by hand: finalists trained from every seed in no time, with logits a test makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from medtune import predictions
from medtune.choose import stage
from medtune.choose.means import Means
from medtune.data import load_pair
from medtune.data.shifts import SHIFTS
from medtune.definition import Definition, describe
from medtune.evaluate import figures, shift_figures
from medtune.predictions import Predicted
from medtune.record import write_json
from medtune.search.conductor import attempt_folder
from medtune.search.ledger import Ledger
from medtune.search.space import Listed, SearchSpace
from medtune.storage.home import LEDGER
from tests.support.made_study import MadeStudy

MEANS = Means(wandb="off")
IMAGES = 120


def logits(strength: float, seed: int, classes: int, images: int = IMAGES) -> Predicted:
    """Classes told apart by `strength` standard deviations."""
    labels = np.arange(images) % classes
    noise = np.random.default_rng(seed).normal(0, 1, (images, classes))
    return Predicted((noise + strength * np.eye(classes)[labels]).astype(np.float32), labels)


def predicted(strength: float, external: float, seed: int, classes: int = 2) -> dict[str, Predicted]:
    """A training's predictions; `external`: how strong it is elsewhere."""
    shifted = [logits(0.8 * strength, 10 * seed + n, classes) for n in range(len(SHIFTS))]
    parts = {name: np.concatenate([getattr(one, name) for one in shifted]) for name in ("logits", "labels")}
    return {
        "val": logits(strength, seed, classes),
        "test": logits(strength, seed + 1, classes),
        "external": logits(external, seed + 2, classes),
        "external_matched": logits(external, seed + 3, classes),
        "val_shift": Predicted(**parts),
    }


def trained(
    made: MadeStudy,
    seeds: int,
    strength: Callable[[Mapping[str, Any]], float | None],
    *,
    top: int = 3,
    external: Callable[[Mapping[str, Any]], float] = lambda settings: 1.0,
    classes: int = 2,
) -> None:
    """Leave the stage in a study's folder; `strength` of a finalist's settings and seed, None where that training failed."""
    study = made.read()
    chosen = stage.finalists(study, study.selection, top)
    settings = [stage.settings_of(study, row) for row in chosen]
    plan: Sequence[Mapping[str, Any]] = stage.planned([], settings, stage.fresh_seeds(study, seeds))
    config = stage.stage_config(study, plan, len(plan), MEANS)
    definition = Definition(script="choose", space=SearchSpace.of(plan, Listed), first=plan, planned=True)
    folder = study.folder / stage.STAGES / stage.NAME
    folder.mkdir(parents=True)
    about = describe(config, definition, load_pair("synthetic"))
    write_json(folder / "study.json", {"id": "stage-1", "name": stage.NAME, "created": 0.0, **about})
    ledger = Ledger.open(folder / LEDGER, stage.NAME, "minimize")
    for one in plan:
        number = ledger.ask(definition.space, config, one)
        strong = strength(one)
        ledger.note(number, attempt=1)
        if strong is None:
            ledger.finish(number, "FAIL", None, "TrainingDiverged: train loss is nan")
            continue
        found = predicted(strong, external(one), 100 + 7 * number, classes)
        at = attempt_folder(folder / "trials", number, 1)
        at.mkdir(parents=True)
        predictions.write(at, found)
        val, elsewhere, shifted = (found[name] for name in ("val", "external", "val_shift"))
        best = figures(torch.from_numpy(val.logits), val.labels, "val", loss=True)
        tested = figures(torch.from_numpy(elsewhere.logits), elsewhere.labels, "external", loss=False)
        tested |= shift_figures(torch.from_numpy(shifted.logits), val.labels)
        ledger.note(number, latest={"best": {"epoch": 1, **best}, "external": tested, "seconds": {}, "node": "n"})
        ledger.finish(number, "COMPLETE", best["val/loss"])
