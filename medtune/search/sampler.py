"""TPE over a part of a long study: its best trials, its newest, and those that run.

TPE compares two densities. The good one is made of 25 trials at most (Optuna's default), and those are here whatever their
age, so it is what it would be over the whole study. The other tells where trials went that were not good; Optuna weighs
it towards the newest already, as TPE's authors did (Bergstra et al. 2013, "forgetting"). Here what is older than the newest
`NEWEST` is forgotten altogether: a proposal then takes no longer in a study of 10,000 trials than in one of 1,000.
"""

from __future__ import annotations

import heapq
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


class _Part(optuna.Study):
    """A study in which only some trials are seen."""

    def __init__(self, study: optuna.Study, trials: list[FrozenTrial]) -> None:
        self.__dict__.update(study.__dict__)
        self.part = trials

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        return [trial for trial in self.part if states is None or trial.state in states]


class PartTPE(optuna.samplers.TPESampler):
    """TPE for one proposal, which depends on the seed and on the study's rows alone."""

    def __init__(self, *, seed: int, random_starts: int, newest: int = NEWEST) -> None:
        super().__init__(seed=seed, n_startup_trials=random_starts)
        self._newest = max(newest, random_starts)
        self._seen: _Part | None = None

    def _part(self, study: optuna.Study) -> _Part:
        if self._seen is None:
            self._seen = _Part(study, part(study, self._newest))
        return self._seen

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What all ended trials have. A study's space never changes, so that names alone need to be compared."""
        ended = [trial.distributions for trial in self._part(study).part if trial.state.is_finished()]
        shared = set.intersection(*map(set, ended)) if ended else set()
        return {name: ended[-1][name] for name in sorted(shared) if not ended[-1][name].single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(self._part(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return super().sample_independent(self._part(study), trial, param_name, param_distribution)


def part(study: optuna.Study, newest: int) -> list[FrozenTrial]:
    """The trials that TPE takes as good, the `newest` of the others that ended, and those that run, by number."""
    trials = study.get_trials(deepcopy=False)
    ended: dict[TrialState, list[FrozenTrial]] = {TrialState.COMPLETE: [], TrialState.PRUNED: []}
    running = []
    for trial in trials:
        if trial.state in ended:
            ended[trial.state].append(trial)
        elif trial.state == TrialState.RUNNING:
            running.append(trial)
    complete, pruned = ended.values()
    if len(complete) + len(pruned) <= newest:
        return sorted([*complete, *pruned, *running], key=_number)
    sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
    # Optuna's order: complete ones by value, then pruned ones, the longest trained first; of equals the first.
    good = heapq.nsmallest(GOOD, complete, key=lambda trial: sign * trial.values[0])
    good += heapq.nsmallest(GOOD - len(good), pruned, key=lambda trial: _pruned(trial, sign))
    late = heapq.nlargest(newest, [*complete, *pruned], key=_number)
    chosen = {trial.number: trial for trial in (*good, *late, *running)}
    return [chosen[number] for number in sorted(chosen)]


def _number(trial: FrozenTrial) -> int:
    return trial.number


def _pruned(trial: FrozenTrial, sign: float) -> tuple[float, float]:
    step = trial.last_step
    if step is None:
        return 1.0, 0.0
    value = trial.intermediate_values[step]
    return -step, math.inf if math.isnan(value) else sign * value
