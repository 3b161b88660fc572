"""The search space: what TPE sees, and that each dimension changes what is trained."""

import json

import optuna
import pytest

import medtune.models
from medtune.config import StudyConfig, TrialConfig, preset
from medtune.errors import ConfigError
from medtune.recipes import BATCH_SIZES, EPOCHS, MEDVIT, MODELS, report_settings, report_variations
from medtune.search.plan import plan
from medtune.search.space import Choice, Following, Milestones, Real, SearchSpace, Whole
from sweeps import all_models, medmamba, medvit, resnet50
from sweeps.medmamba import REPORT, SPACE

SCRIPTS = {"all_models": all_models, "medmamba": medmamba, "medvit": medvit, "resnet50": resnet50}
MODEL = Choice(options=("medmamba_s", "medmamba_t", "resnet50"))


@pytest.fixture(autouse=True)
def every_model(monkeypatch):
    """Names alone: nothing is built here."""
    monkeypatch.setattr(medtune.models, "available", lambda: MODELS)


def suggest(space, seed, n=30):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.suggest(study.ask()) for _ in range(n)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_suggestion_makes_a_valid_trial_and_every_dimension_varies(script):
    space = SCRIPTS[script].SPACE
    base = TrialConfig(model=getattr(SCRIPTS[script], "DEFAULTS", {}).get("model", "medmamba_s"))
    space.check(base)
    configs = [base.replace(**settings) for settings in suggest(space, 0)]
    for name in space.dimensions:
        assert len({getattr(config, name) for config in configs}) > 1, f"{name} never varies"


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("pretrained", Choice(options=(None, "weights.pth"))),
        ("activation_checkpointing", Choice(options=(False, True))),
        ("imbalance", Choice(options=("none", "weighted", "balanced"))),
        ("augmentation", Real(low=0.0, high=1.0)),
        ("clip_norm", Choice(options=(None, 1.0))),
        ("schedule", Choice(options=("milestones", "constant"))),
        ("micro_batch", Whole(low=8, high=32)),
        ("milestones", Choice(options=((1 / 3, 1 / 2), (0.5, 0.75), ()))),
    ],
)
def test_any_setting_can_be_a_dimension(name, dimension):
    space = SearchSpace(**{name: dimension})
    space.check(TrialConfig())
    configs = {TrialConfig().replace(**settings) for settings in suggest(space, 0)}
    assert len(configs) == len(dimension.extremes(name)) or len(configs) > 10


@pytest.mark.filterwarnings("error")
def test_a_choice_of_tuples_goes_through_the_ledger_and_back():
    options = ((1 / 3, 1 / 2), (0.5, 0.75))
    space = SearchSpace(milestones=Choice(options=options))
    study = optuna.create_study()
    study.enqueue_trial(json.loads(json.dumps(space.encode({"milestones": list(options[1])}))))
    assert space.suggest(study.ask()) == {"milestones": options[1]}
    with pytest.raises(ConfigError, match=r"milestones = '\[0.1\]', outside"):
        space.encode({"milestones": (0.1,)})


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


def test_patch_momentum_is_suggested_for_the_models_that_have_it():
    found = suggest(all_models.SPACE, 1)
    assert {settings["model"] in MEDVIT for settings in found} == {True, False}
    for settings in found:
        assert ("patch_momentum" in settings) == (settings["model"] in MEDVIT)


def test_a_dimension_is_checked_where_it_applies(monkeypatch):
    checked = []
    real = TrialConfig.replace
    monkeypatch.setattr(TrialConfig, "replace", lambda self, **changes: checked.append(changes) or real(self, **changes))
    all_models.SPACE.check(TrialConfig())
    momentum = [changes for changes in checked if "patch_momentum" in changes]
    assert {changes["model"] for changes in momentum} == set(MEDVIT)


def test_batch_and_epochs_follow_the_model_and_optuna_is_not_asked():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(10):
        trial = study.ask()
        settings = all_models.SPACE.suggest(trial)
        assert (settings["batch_size"], settings["epochs"]) == (BATCH_SIZES[settings["model"]], EPOCHS[settings["model"]])
        assert not {"batch_size", "epochs"} & set(trial.params)


def test_a_fixed_model_fixes_what_follows_it():
    space, base = all_models.SPACE.without(["model"], TrialConfig(model="medvit_small"))
    assert (base.batch_size, base.epochs) == (128, 100)
    assert not {"model", "batch_size", "epochs"} & set(space.dimensions) and "patch_momentum" in space.dimensions
    assert "patch_momentum" not in all_models.SPACE.without(["model"], TrialConfig())[0].dimensions


def test_a_following_setting_that_is_fixed_follows_no_more():
    space, base = all_models.SPACE.without(["batch_size"], TrialConfig(batch_size=32))
    assert base.batch_size == 32 and "batch_size" not in suggest(space, 0, 1)[0] and "epochs" in space.dimensions
    space, base = all_models.SPACE.without(["model", "batch_size"], TrialConfig(model="medvit_small", batch_size=32))
    assert (base.batch_size, base.epochs) == (32, 100)


def test_what_follows_a_fixed_setting_under_a_condition_keeps_the_condition():
    follows = Following(by="model", values={"medmamba_s": 0.5, "resnet50": 0.9}, only_if=("optimizer", "sgd"))
    space = SearchSpace(model=MODEL, optimizer=Choice(options=("adam", "sgd")), momentum=follows)
    for settings in suggest(space.without(["model"], TrialConfig())[0], 0, 10):
        assert settings.get("momentum") == (0.5 if settings["optimizer"] == "sgd" else None)


def test_a_model_that_nothing_is_known_of_is_named():
    space = SearchSpace(model=MODEL, epochs=Following(by="model", values={"medmamba_s": 150, "medmamba_t": 150}))
    with pytest.raises(ConfigError, match="epochs follows model, and has no value for model 'resnet50'"):
        space.check(TrialConfig())
    with pytest.raises(ConfigError, match="no value for model 'vim_tiny': it knows medmamba_s, medmamba_t"):
        space.without(["model"], TrialConfig(model="vim_tiny"))


def test_what_follows_comes_after_what_it_follows():
    with pytest.raises(ConfigError, match="'epochs' depends on 'model', which must come before"):
        SearchSpace(epochs=Following(by="model", values={}), model=MODEL)


def test_settings_to_try_first_agree_with_what_follows():
    space = all_models.SPACE
    base = all_models.REPORT[0]
    assert (base["batch_size"], base["epochs"]) == (64, 150)
    assert not {"batch_size", "epochs"} & set(space.encode(base))
    with pytest.raises(ConfigError, match=r"batch_size = 32, but it follows model: 64 for 'medmamba_s'"):
        space.encode({**base, "batch_size": 32})
    with pytest.raises(ConfigError, match=r"batch_size = 64, but it follows model"):
        space.encode({"batch_size": 64})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_try_the_reports_settings_and_leaves_none_of_their_dimensions_to_chance(script):
    module = SCRIPTS[script]
    assert module.REPORT
    study = optuna.create_study()
    for settings in module.REPORT:
        params = module.SPACE.encode(module.SPACE.completed(settings, TrialConfig()))
        study.enqueue_trial(params)
        trial = study.ask()
        suggested = module.SPACE.suggest(trial)
        chance = {key.split(".")[0] for key in set(trial.params) - set(params)}
        assert chance <= {"weight_decay"}
        for name in set(suggested) & set(settings) - {"milestones"}:
            assert suggested[name] == settings[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_lets_asha_judge_before_the_learning_rate_drops(script):
    module = SCRIPTS[script]
    rung = getattr(module, "DEFAULTS", {}).get("first_rung", StudyConfig().first_rung)
    config = StudyConfig(first_rung=rung)
    latest = module.SPACE.dimensions["milestones"].first[1]
    for epochs in {*EPOCHS.values(), preset("laptop").trial.epochs}:
        drop = TrialConfig(epochs=epochs, milestones=(latest,)).milestone_epochs()[0]
        assert config.rungs(epochs)[1] >= drop


def test_the_reports_fourteen_settings():
    said, ran = report_settings(False), report_settings(True)
    assert [one["model"] for one in said[:7]] == [
        "medmamba_b", "medmamba_s", "medmamba_t", "medvit_large", "medvit_base", "medvit_small", "resnet50"
    ]
    assert len(said) == len(ran) == len({repr(sorted(one.items())) for one in said}) == 14
    assert said[7:] == report_variations() and {one["model"] for one in said[7:]} == {"medmamba_s"}
    for settings in (*said, *ran):
        assert TrialConfig().replace(**settings).milestone_epochs() == (50, 75)
    for settings in said:
        assert (settings["batch_size"], settings["epochs"]) == (
            (64, 150) if settings["model"].startswith("medmamba") else (128, 100)
        )
    assert {one["model"] for one in said if one.get("clip_norm")} == {"medvit_large"}
    assert (ran[6]["batch_size"], ran[6]["epochs"]) == (64, 150)
    assert {one["schedule"] for one in ran} == {"constant"} and not any("schedule" in one for one in said)
    assert all(one.get("momentum", 0.0) == 0.0 for one in said)


def planned(**changes):
    more = {name: changes.pop(name) for name in ("seeds", "given", "without") if name in changes}
    return plan(report_settings(changes.pop("as_run", False)), TrialConfig(**changes), **{"seeds": 2} | more)


def test_a_plan_is_seed_by_seed_and_names_every_setting():
    found = planned(seed=3)
    assert [one["seed"] for one in found] == [3] * 14 + [4] * 14
    assert [one["model"] for one in found[:14]] == [one["model"] for one in found[14:]]
    assert len({tuple(one) for one in found}) == 1 and found[0]["clip_norm"] is None and found[3]["clip_norm"] == 1.0
    assert planned(seed=3, seeds=3)[:28] == found


def test_a_plans_space_holds_it_and_stays_the_same_with_more_seeds():
    space = SearchSpace.of(planned())
    assert space.describe() == SearchSpace.of(planned(seeds=5)).describe()
    study = optuna.create_study()
    for settings in planned():
        study.enqueue_trial(space.encode(settings))
        assert space.suggest(study.ask()) == settings


def test_a_planned_setting_that_is_given_leaves_those_that_have_it():
    assert {one["model"] for one in planned(model="medvit_small", given=["model"])} == {"medvit_small"}
    assert len(planned(lr=1e-4, given=["lr"], seeds=1)) == 2
    assert [one["model"] for one in planned(clip_norm=1.0, given=["clip_norm"], seeds=1)] == ["medvit_large"]
    with pytest.raises(ConfigError, match=r"no planned settings have model 'vim_tiny'. Planned are model: medmamba_b, "):
        planned(model="vim_tiny", given=["model"])


def test_epochs_and_batch_given_hold_for_the_whole_plan():
    found = planned(epochs=3, given=["epochs"], seeds=1)
    assert len(found) == 14 and not any("epochs" in one for one in found) and found[0]["batch_size"] == 64


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
