"""Whether TPE finds worse settings when it models a long study's best and newest trials alone, and what that saves.

Run:  python -m benchmarks.forgetting [--trials 2000] [--seeds 3] [--newest 250 500]

A made loss over the space of sweeps/all_models.py, with noise; 50 trials at a time, the worse half of them stopped early.
The figure is the loss without noise of the trial that looks best.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna

from benchmarks.scale import all_models
from medtune.config import TrialConfig
from medtune.search.sampler import Modelled, PartTPE

AT_A_TIME = 50
RANDOM_STARTS = 10


def loss(settings: Mapping[str, Any]) -> float:
    """0 at best; each model has a learning rate of its own, as has each optimizer."""
    place = sum(map(ord, settings["model"])) % 7
    best_lr = -3.4 + 0.15 * place + 0.5 * (settings["optimizer"] == "sgd")
    found = 0.02 * place + 0.2 * (math.log10(settings["lr"]) - best_lr) ** 2
    found += 0.05 * (math.log10(settings["gamma"]) + 1) ** 2 + 0.2 * (settings["augmentation"] - 0.6) ** 2
    found += 0.3 * (settings.get("momentum", 0.9) - 0.9) ** 2 + 0.3 * (settings["milestones"][0] - 0.3) ** 2
    return found + {"none": 0.0, "weighted": 0.01, "balanced": 0.03}[settings["imbalance"]]


def search(trials: int, newest: int, seed: int, marks: list[int]) -> tuple[list[float], list[float]]:
    """The loss without noise of the best so far, and the CPU milliseconds of a proposal, at each of `marks` trials."""
    space, _ = all_models(TrialConfig())
    study, rng = optuna.create_study(), random.Random(seed)
    modelled = Modelled(study)
    running: list[tuple[optuna.trial.Trial, float]] = []
    seen: list[float] = []
    best, true, spent = math.inf, math.inf, 0.0
    found: list[float] = []
    costs: list[float] = []
    for number in range(trials):
        started = time.thread_time()
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study.sampler = PartTPE(modelled, seed=own, random_starts=RANDOM_STARTS, newest=newest)
        trial = study.ask()
        running.append((trial, loss(space.suggest(trial))))
        modelled.note(trial.storage.get_trial(trial._trial_id))
        spent += time.thread_time() - started
        if len(running) == AT_A_TIME:
            ended, value = running.pop(rng.randrange(AT_A_TIME))
            noisy = value + rng.gauss(0, 0.02)
            seen.append(noisy)
            ended.report(noisy, step=4)
            if noisy > float(np.median(seen)):
                study.tell(ended, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(ended, noisy)
                best, true = min((best, true), (noisy, value))
            modelled.note(trial.storage.get_trial(ended._trial_id))
        if number + 1 in marks:
            found.append(true)
            costs.append(1000 * spent / (number + 1 - (marks[len(costs) - 1] if costs else 0)))
            spent = 0.0
    return found, costs


def main() -> None:
    """Print a line for each number of newest trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--newest", type=int, nargs="+", default=[250, 500])
    args = parser.parse_args()
    marks = [args.trials // 4, args.trials // 2, args.trials]
    for newest in (*args.newest, args.trials):
        runs = [search(args.trials, newest, seed, marks) for seed in range(args.seeds)]
        losses, costs = np.array([found for found, _ in runs]), np.array([cost for _, cost in runs]).mean(axis=0)
        at = [
            f"{mark}: {np.median(losses[:, i]):.4f} [{losses[:, i].min():.4f}, {losses[:, i].max():.4f}], {costs[i]:.1f} ms"
            for i, mark in enumerate(marks)
        ]
        name = "the whole study" if newest == args.trials else f"newest {newest}"
        print(f"{name}; best loss at {'; '.join(at)} a proposal", flush=True)


if __name__ == "__main__":
    main()
