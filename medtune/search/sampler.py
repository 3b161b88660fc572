"""TPE over a part of a long study: its best trials, its newest, and those that run.

TPE compares two densities. The good one is made of 25 trials at most (Optuna's default), and those are here whatever their
age, so it is what it would be over the whole study. The other tells where trials went that were not good; Optuna weighs
it towards the newest already, as TPE's authors did (Bergstra et al. 2013, "forgetting"). Here what is older than the newest
`NEWEST` is forgotten altogether: a proposal then takes no longer in a study of 10,000 trials than in one of 1,000.
"""

from __future__ import annotations

import bisect
import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

GOOD = 25
"""Trials that Optuna's TPE takes as good at most."""
NEWEST = 250
"""Ended trials that are modelled besides, by number; a study that has no more is modelled whole."""


class Modelled:
    """The trials of a study that TPE is to see, kept in order as they begin and end."""

    def __init__(self, study: optuna.Study) -> None:
        self.sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        self.running: dict[int, FrozenTrial] = {}
        self.ended: list[FrozenTrial] = []
        """By number."""
        self.ranked: list[FrozenTrial] = []
        """The best first."""
        for trial in study.get_trials(deepcopy=False):
            self.note(trial)

    def note(self, trial: FrozenTrial) -> None:
        """A trial has its parameters, or has ended."""
        if trial.state == TrialState.RUNNING:
            self.running[trial.number] = trial
            return
        self.running.pop(trial.number, None)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            bisect.insort(self.ended, trial, key=lambda other: other.number)
            bisect.insort(self.ranked, trial, key=self._rank)

    def trials(self, newest: int) -> list[FrozenTrial]:
        """Those that TPE takes as good, the `newest` of all that ended, and those that run, by number."""
        good = self.ranked[:GOOD] if len(self.ended) > newest else []
        chosen = {trial.number: trial for trial in (*good, *self.ended[-newest:], *self.running.values())}
        return [chosen[number] for number in sorted(chosen)]

    def _rank(self, trial: FrozenTrial) -> tuple[float, ...]:
        """Optuna's order: complete ones by value, then pruned ones, the longest trained first; of equals the first."""
        if trial.state == TrialState.COMPLETE:
            return 0.0, self.sign * trial.values[0], 0.0, trial.number
        step = trial.last_step
        if step is None:
            return 1.0, 1.0, 0.0, trial.number
        value = trial.intermediate_values[step]
        return 1.0, -step, math.inf if math.isnan(value) else self.sign * value, trial.number


class _Part(optuna.Study):
    """A study in which only some trials are seen."""

    def __init__(self, study: optuna.Study, trials: list[FrozenTrial]) -> None:
        self.__dict__.update(study.__dict__)
        self.part = trials

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        return [trial for trial in self.part if states is None or trial.state in states]


class PartTPE(optuna.samplers.TPESampler):
    """TPE for one proposal, which depends on the seed and on the trials that it sees alone."""

    def __init__(self, modelled: Modelled, *, seed: int, random_starts: int, newest: int = NEWEST) -> None:
        super().__init__(seed=seed, n_startup_trials=random_starts)
        self.seen = modelled.trials(max(newest, random_starts))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What all ended trials have. A study's space never changes, so that names alone need to be compared."""
        ended = [seen.distributions for seen in self.seen if seen.state.is_finished()]
        shared = set.intersection(*map(set, ended)) if ended else set()
        return {name: ended[-1][name] for name in sorted(shared) if not ended[-1][name].single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(_Part(study, self.seen), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return super().sample_independent(_Part(study, self.seen), trial, param_name, param_distribution)
