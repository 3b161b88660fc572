"""The search space: what TPE sees, and that each dimension changes what is trained."""

import optuna
import pytest

from medtune.config import TrialConfig
from medtune.errors import ConfigError
from medtune.search.space import Choice, Milestones, Real, SearchSpace
from sweeps.medmamba import REPORT, SPACE


def suggest(space, seed, n=30):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.suggest(study.ask()) for _ in range(n)]


def test_every_suggestion_makes_a_valid_trial_and_every_dimension_varies():
    found = suggest(SPACE, 0)
    configs = [TrialConfig().replace(**settings) for settings in found]
    for name in SPACE.dimensions:
        assert len({getattr(config, name) for config in configs}) > 1, f"{name} never varies"


def test_momentum_is_suggested_for_sgd_alone():
    for settings in suggest(SPACE, 1):
        assert ("momentum" in settings) == (settings["optimizer"] == "sgd")


def test_the_report_settings_survive_encoding():
    study = optuna.create_study()
    for settings in REPORT:
        study.enqueue_trial(SPACE.encode(settings))
        suggested = SPACE.suggest(study.ask())
        config, wanted = (TrialConfig().replace(**s) for s in (suggested, settings))
        assert config.milestone_epochs() == (50, 75) == wanted.milestone_epochs()
        assert config.replace(milestones=()) == wanted.replace(milestones=())


def test_report_has_the_base_and_seven_distinct_variations():
    assert len(REPORT) == 8 and len({repr(sorted(s.items())) for s in REPORT}) == 8
    assert all(TrialConfig().replace(**s).model == "medmamba_s" for s in REPORT)


@pytest.mark.parametrize("epochs", [5, 10, 150])
def test_first_milestone_falls_where_every_preset_feels_it(epochs):
    for settings in suggest(SPACE, 2):
        drops = TrialConfig(epochs=epochs).replace(**settings).milestone_epochs()
        assert drops and drops[0] <= 0.4 * epochs + 0.5 and drops == tuple(sorted(set(drops)))
        assert drops[-1] < epochs


def test_settings_outside_the_space_are_named():
    with pytest.raises(ConfigError, match=r"lr = 0.5, outside"):
        SPACE.encode({**REPORT[0], "lr": 0.5})


def test_a_searched_setting_that_is_not_given_is_left_to_the_searcher():
    space = SearchSpace(**SPACE.dimensions, weight_decay=Real(low=1e-6, high=1e-2, log=True))
    study = optuna.create_study()
    study.enqueue_trial(space.encode(REPORT[0]))
    suggested = space.suggest(study.ask())
    assert suggested["lr"] == REPORT[0]["lr"] and 1e-6 <= suggested["weight_decay"] <= 1e-2


def test_unevenly_spaced_milestones_cannot_be_searched():
    with pytest.raises(ConfigError, match="evenly spaced"):
        SPACE.encode({**REPORT[0], "milestones": (0.1, 0.2, 0.5)})


def test_a_misspelt_dimension_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'gamma'"):
        SearchSpace(gama=Real(low=0.1, high=1))


def test_a_condition_must_come_first():
    with pytest.raises(ConfigError, match="must come before"):
        SearchSpace(momentum=Real(low=0, high=0.9, only_if=("optimizer", "sgd")), optimizer=Choice(options=("sgd",)))


def test_fixing_a_setting_takes_it_and_what_hangs_on_it_out():
    adam, _ = SPACE.without(["optimizer"], TrialConfig(optimizer="adam"))
    assert set(adam.dimensions) == {"model", "lr", "milestones", "gamma"}
    sgd, _ = SPACE.without(["optimizer"], TrialConfig(optimizer="sgd"))
    assert "momentum" in suggest(sgd, 3, 1)[0]


def test_milestones_past_the_end_are_dropped():
    dimension = Milestones()
    params = {"m.first": 0.4, "m.gap": 0.3, "m.count": 3}
    assert dimension.decode("m", params) == pytest.approx((0.4, 0.7))
