"""`medtune choose`."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from typing import Annotated

import tyro

from medtune.choose.means import Means


def choose(
    study: tyro.conf.Positional[str],
    *,
    top: int = 3,
    seeds: int = 5,
    by: str | None = None,
    threshold: str | None = None,
    storage: str | None = None,
    json: bool = False,
    means: Annotated[Means, tyro.conf.arg(name="")] = Means(),  # noqa: B008 frozen
) -> int | None:
    """Train the best trials again from fresh seeds, rank them with intervals, and name the one to deploy.

    The same command goes on where it was stopped; what was trained is not trained again.

    Args:
        study: The study's name, or its folder.
        top: Finalists: the best trials that were trained to the end.
        seeds: Trainings of each finalist, from seeds that none of the study's trials had.
        by: Metric to choose by: val/auc, val_shift/auc, ...; default: the study's selection metric. external/... is possible
            and labelled wherever it appears.
        threshold: Decision threshold, set on val: sensitivity=0.95, youden, costs=5:1 (missed positive to false alarm) or
            argmax; default: sensitivity=0.95, with more than two classes argmax.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
        json: Print JSON; what happens meanwhile goes to stderr.
    """
    from medtune.choose.show import print_choice
    from medtune.driver import outliving_client
    from medtune.launch import cluster_address

    with outliving_client() if cluster_address() else contextlib.nullcontext():
        try:
            with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
                found = make(study, top, seeds, by, threshold, storage, means)
        except KeyboardInterrupt:
            print("stopped. The same command goes on from here.", file=sys.stderr)
            return 130
        print(json_module.dumps(found, indent=1)) if json else print_choice(found)
    return None


def make(
    name: str,
    top: int,
    seeds: int,
    by: str | None,
    threshold: str | None,
    storage: str | None,
    means: Means,
    trainable: type | None = None,
) -> dict[str, object]:
    """Train the finalists, choose, and write it down; returns the choice (`medtune.choose.build.choice`).

    `trainable`: what trains instead of `MedtuneTrial`. Raises MedtuneError.
    """
    from medtune.choose.build import choice
    from medtune.choose.deployed import rule_of
    from medtune.choose.ranking import require_rankable
    from medtune.choose.record import mention, write_choice
    from medtune.choose.show import print_choice
    from medtune.choose.stage import finalists, fresh_seeds, note, train
    from medtune.record import plain
    from medtune.results import load_study, predicted

    study = load_study(name, storage)
    by = by or study.selection
    require_rankable(by)
    trials = finalists(study, by, top)
    found = predicted(study, trials[0])
    rule = rule_of(threshold, found["val"].logits.shape[1] if found else 2)
    stage = train(study, trials, fresh_seeds(study, seeds), means, trainable)
    chosen = plain(choice(study, stage, trials, by, rule))
    write_choice(study, chosen)
    note(stage, f"chosen: {mention(study)}", lambda: print_choice(chosen))
    return chosen
