"""TPE over a part of a study: which part, and that a proposal hangs on the seed and the rows alone."""

import math
import random
from functools import partial

import optuna
import pytest
from optuna.samplers._tpe.sampler import _split_trials
from optuna.trial import TrialState, create_trial

from medtune.config import StudyConfig, TrialConfig
from medtune.search import ledger as ledger_module
from medtune.search.ledger import Ledger
from medtune.search.sampler import GOOD, Modelled, PartTPE
from medtune.search.space import Choice, Real, SearchSpace

SPACE = SearchSpace(model=Choice(options=("medmamba_t", "resnet50")), lr=Real(low=1e-4, high=1e-2, log=True))
DISTRIBUTIONS = {"x": optuna.distributions.FloatDistribution(0, 1)}


def study(count, *, complete, running=7, direction="minimize"):
    """Ended trials, that share of them COMPLETE, with equal values among them, and running ones."""
    rng = random.Random(0)
    made = optuna.create_study(direction=direction)
    trials = []
    for _ in range(count):
        value, epochs = round(rng.random(), 2), rng.choice((1, 2, 4))
        values = {epoch: value if rng.random() < 0.95 else math.nan for epoch in range(1, epochs + 1)}
        if rng.random() < complete:
            what = {"state": TrialState.COMPLETE, "value": value}
        else:
            what = {"state": TrialState.PRUNED, "intermediate_values": values if rng.random() < 0.9 else {}}
        trials.append(create_trial(params={"x": rng.random()}, distributions=DISTRIBUTIONS, **what))
    trials.insert(count // 2, create_trial(state=TrialState.FAIL, params={"x": 0.5}, distributions=DISTRIBUTIONS))
    made.add_trials(trials)
    for _ in range(running):
        made.ask(DISTRIBUTIONS)
    return made


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("complete", [0.0, 0.02, 0.5])
def test_what_tpe_takes_as_good_is_what_it_would_be_over_the_whole_study(direction, complete):
    whole = study(600, complete=complete, direction=direction)
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    seen = Modelled(whole).trials(100)
    good, others = _split_trials(whole, whole.get_trials(states=states), GOOD)
    good_seen, others_seen = _split_trials(whole, seen, GOOD)
    assert [trial.number for trial in good_seen] == [trial.number for trial in good]
    running = [trial.number for trial in others if trial.state == TrialState.RUNNING]
    assert len(running) == 7 and set(running) <= {trial.number for trial in others_seen}
    newest = [trial.number for trial in whole.get_trials(states=states[:2])][-100:]
    assert {trial.number for trial in others_seen} == set(newest) - {trial.number for trial in good} | set(running)


def test_a_study_that_is_not_long_is_modelled_whole():
    whole = study(40, complete=0.5)
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    assert Modelled(whole).trials(40) == whole.get_trials(states=states)
    proposals = []
    for one in (PartTPE(Modelled(whole), seed=3, random_starts=5), optuna.samplers.TPESampler(seed=3, n_startup_trials=5)):
        whole.sampler = one
        proposals.append(whole.ask(DISTRIBUTIONS).params)
        whole.tell(whole.trials[-1].number, state=TrialState.FAIL)
    assert proposals[0] == proposals[1]


def test_random_starts_are_counted_in_a_long_study_too():
    whole = study(100, complete=0.5)
    whole.sampler = PartTPE(Modelled(whole), seed=0, random_starts=60, newest=20)
    proposal = whole.ask(DISTRIBUTIONS)
    assert proposal.relative_params, "still drawn at random after 60 trials"


def test_a_resumed_long_study_proposes_what_an_uninterrupted_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "PartTPE", partial(PartTPE, newest=30))
    config = StudyConfig(trials=80, trial=TrialConfig(epochs=5, pair="synthetic"))

    def proposed(name, resumed):
        path = tmp_path / f"{name}.journal"
        ledger = Ledger.open(path, "s", "minimize")
        found = []
        for number in range(80):
            if resumed and number % 9 == 0:
                ledger = Ledger.open(path, "s", "minimize")
            ledger.ask(SPACE, config, None)
            settings = ledger.row(number).settings
            found.append(settings)
            ledger.record_epoch(number, 1, abs(math.log10(settings["lr"] / 1e-3)) + (settings["model"] == "resnet50"))
            if number % 10 != 3:  # some are left running
                state = "COMPLETE" if number % 3 else "PRUNED"
                ledger.finish(number, state, ledger.row(number).value)
        return found

    assert proposed("whole", resumed=False) == proposed("resumed", resumed=True)
