"""Finalists compared: order, intervals, ties, and what is deployed, from logits that tests make."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from medtune import metrics
from medtune.choose import deployed
from medtune.choose.deployed import decision, rule_of
from medtune.choose.hindsight import correlations
from medtune.choose.ranking import Finalist, compare, require_rankable
from medtune.data.shifts import SHIFTS
from medtune.errors import ConfigError
from medtune.evidence.comparison import holm
from medtune.predictions import Predicted
from medtune.search.ledger import Row

LABELS = np.arange(300) % 2


def logits(strength, seed):
    """Two classes told apart by `strength` standard deviations."""
    noise = np.random.default_rng(seed).normal(0, 1, len(LABELS))
    return np.stack([np.zeros(len(LABELS)), strength * (LABELS - 0.5) + noise], axis=1).astype(np.float32)


def row(number):
    return Row(number, "COMPLETE", {}, 0.0, 4)


def finalist(number, strength, seeds=(1, 2, 3), noise=0):
    def predictions(seed):
        shifted = np.concatenate([logits(strength, 100 * seed + n) for n in range(len(SHIFTS))])
        return {
            "val": Predicted(logits(strength, seed + noise), LABELS),
            "val_shift": Predicted(shifted, np.tile(LABELS, len(SHIFTS))),
        }

    found = [predictions(seed) for seed in seeds]
    values = [metrics.classification(metrics.softmax(one["val"].logits), LABELS)["auc"] for one in found]
    return Finalist(row(number), [row(n) for n in range(len(seeds))], [], values, found)


def test_the_mean_has_students_interval_over_the_seeds():
    one = finalist(0, 1.0)
    wanted = stats.t.interval(0.95, 2, loc=np.mean(one.values), scale=stats.sem(one.values))
    assert one.interval() == pytest.approx(wanted)
    assert finalist(0, 1.0, seeds=(1,)).interval() is None


def test_a_clearly_worse_finalist_is_told_apart_and_an_equal_one_is_tied():
    clear, equal = compare([finalist(0, 3.0), finalist(1, 0.5), finalist(2, 3.0, noise=50)], "val/auc")
    assert not clear.tied and clear.images < 0.001 and clear.seeds < 0.05
    assert equal.tied


def test_p_values_are_corrected_for_all_pairs_as_any_could_have_differed_most():
    four = [finalist(0, 1.6), finalist(1, 1.5), finalist(2, 1.4, noise=9), finalist(3, 1.1, noise=9)]
    alone = {(a, b): compare([four[a], four[b]], "val/auc")[0] for a, b in itertools.combinations(range(4), 2)}
    among = compare(four, "val/auc")
    for test in ("images", "seeds"):
        wanted = dict(zip(alone, holm([getattr(one, test) for one in alone.values()]), strict=True))
        assert [getattr(one, test) for one in among] == pytest.approx([wanted[0, 1], wanted[0, 2], wanted[0, 3]])
    assert 0 < alone[0, 3].images < among[2].images < 1


def test_the_mean_over_the_seeds_is_compared_not_what_their_average_would_predict():
    """Runs that err on different images predict better together than each: no run that is deployed does."""
    alike, varied = finalist(0, 1.5, seeds=(4, 4, 4)), finalist(1, 1.45, seeds=(1, 2, 3, 4, 5))
    [against] = compare([alike, varied], "val/auc")
    assert against.images > 0.5 and against.tied


def test_images_alone_do_not_tell_apart_what_seeds_do_not():
    varied = finalist(0, 3.0)
    object.__setattr__(varied, "values", [0.99, 0.60, 0.95])
    [against] = compare([varied, finalist(1, 0.5)], "val/auc")
    assert against.images < 0.001 and against.seeds > 0.05 and against.tied


@pytest.mark.parametrize("by", ["val/loss", "val/f1", "val_shift/auc", "val_shift/loss"])
def test_other_figures_are_compared_by_a_paired_bootstrap(by):
    one, other = finalist(0, 3.0, seeds=(1, 2)), finalist(1, 0.3, seeds=(1, 2))
    assert compare([one, other], by)[0].images < 0.01
    assert compare([one, one], by)[0].images == 1.0


def test_a_single_seed_is_compared_over_images_alone():
    [against] = compare([finalist(0, 3.0, seeds=(1,)), finalist(1, 0.5, seeds=(1,))], "val/auc")
    assert against.seeds is None and not against.tied


def test_a_metric_that_cannot_be_chosen_by_is_named_with_the_nearest():
    require_rankable("external/auc")
    with pytest.raises(ConfigError, match="Did you mean 'val/auc'"):
        require_rankable("val/acu")


@pytest.fixture
def predictions():
    return {name: Predicted(4 * logits(1.5, seed), LABELS) for seed, name in enumerate(deployed.TESTED)}


def test_threshold_and_temperature_are_vals_and_hold_on_every_split(predictions):
    found = decision(predictions, rule_of("sensitivity=0.9", 2), None)
    at = found["figures"]["val"]["at_threshold"]["sensitivity"]
    assert 0.9 <= at["value"] <= 0.92 and at["low"] < at["value"] < at["high"]
    assert found["threshold"]["set_on"] == "val" and 0 < found["threshold"]["value"] < 1
    assert found["temperature"] > 1.5, "these logits are too sure of themselves"
    for name in deployed.TESTED:
        split = found["figures"][name]
        assert split["after"]["brier"]["value"] < split["before"]["brier"]["value"]
        probs = metrics.softmax(predictions[name].logits)
        assert split["argmax"]["auc"]["value"] == pytest.approx(metrics.classification(probs, LABELS)["auc"])
    changed = predictions | {"external": Predicted(-predictions["external"].logits, LABELS)}
    again = decision(changed, rule_of("sensitivity=0.9", 2), None)
    assert (again["threshold"], again["temperature"]) == (found["threshold"], found["temperature"])


def test_figures_without_leaked_images_are_those_of_the_others(predictions):
    leaked = list(range(0, 300, 3))
    found = decision(predictions, rule_of(None, 2), leaked)
    kept = np.setdiff1d(np.arange(300), leaked)
    probs = metrics.softmax(predictions["external"].logits[kept])
    without = found["figures"]["external"]["without_leaked"]
    assert without["n"] == 200
    assert without["argmax"]["auc"]["value"] == pytest.approx(metrics.classification(probs, LABELS[kept])["auc"])
    assert "without_leaked" not in found["figures"]["test"]


def test_a_small_temperature_makes_no_ties_of_the_external_images(predictions):
    """At 0.05 nearly every probability is 0 or 1 to the last bit; the AUC is still the model's."""
    sure = predictions | {"val": Predicted(0.02 * predictions["val"].logits, LABELS)}
    sure["external"] = Predicted(5 * predictions["external"].logits, LABELS)
    found = decision(sure, rule_of(None, 2), None)
    wanted = metrics.classification(metrics.softmax(sure["external"].logits), LABELS)["auc"]
    assert found["temperature"] < 0.1 and found["figures"]["external"]["argmax"]["auc"]["value"] == pytest.approx(wanted)


def test_more_than_two_classes_have_no_threshold():
    labels = np.arange(90) % 3
    values = np.random.default_rng(0).normal(0, 1, (90, 3)).astype(np.float32) + 2 * np.eye(3, dtype=np.float32)[labels]
    found = decision({name: Predicted(values, labels) for name in deployed.TESTED}, rule_of(None, 3), None)
    assert found["threshold"] is None and found["figures"]["val"]["at_threshold"] is None
    with pytest.raises(ConfigError, match="needs two classes, these data have 3"):
        rule_of("youden", 3)


def test_a_threshold_that_nothing_reaches_is_a_number(predictions):
    useless = predictions | {"val": Predicted(np.zeros_like(predictions["val"].logits), LABELS)}
    found = decision(useless, rule_of("costs=1:1000", 2), None)
    assert found["threshold"]["value"] == deployed.NEVER
    assert found["figures"]["test"]["at_threshold"]["sensitivity"]["value"] == 0


def test_hindsight_takes_what_was_trained_to_the_end_and_lacks_nothing():
    def one(state, **figures):
        return SimpleNamespace(state=state, latest={"best": figures})

    rows = [one("COMPLETE", **{"val/loss": 1 - n / 10, "val/auc": n / 10, "external/auc": n / 20}) for n in range(6)]
    rows += [one("PRUNED", **{"val/loss": 0.0, "external/auc": 0.0}), one("COMPLETE", **{"val/loss": 5.0})]
    found = {entry["selection"]: entry for entry in correlations(rows, "these")}
    assert (found["val/loss"]["rho"], found["val/auc"]["rho"]) == (pytest.approx(1), pytest.approx(1)), "less loss is better"
    assert found["val/loss"]["n"] == 6
    assert (found["val_shift/auc"]["rho"], found["val_shift/auc"]["n"]) == (None, 0)
