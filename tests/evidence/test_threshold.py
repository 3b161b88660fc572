"""Thresholds against trying every one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from medtune.errors import ConfigError
from medtune.evidence.threshold import ARGMAX, Rule, at_threshold, choose_threshold
from medtune.metrics import classification, softmax


def cases() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Probabilities with and without ties."""
    for case in range(40):
        rng = np.random.default_rng(case)
        labels = np.concatenate([[0, 1], rng.integers(0, 2, int(rng.integers(1, 60)))])
        logits = rng.normal(size=(len(labels), 2)) + np.eye(2)[labels]
        yield softmax(np.round(logits, int(rng.integers(0, 3)))), labels


@pytest.mark.parametrize("wanted", [0.5, 0.7, 0.9, 0.95, 1.0])
def test_a_wanted_sensitivity_gets_the_largest_threshold_that_reaches_it(wanted: float) -> None:
    for probs, labels in cases():
        found = choose_threshold(Rule.parse(f"sensitivity={wanted}"), probs, labels)
        reaching = [t for t in probs[:, 1] if (at_threshold(probs, labels, t)["sensitivity"] or 0) >= wanted]
        assert found.value == max(reaching)
        assert (found.figures["sensitivity"] or 0) >= wanted


def test_a_sensitivity_that_is_a_whole_number_of_images_is_not_missed_by_rounding() -> None:
    """0.7 of 10 is 7.000000000000001 in floating point on some ways: seven found images are enough."""
    scores = np.linspace(0.05, 0.95, 10)
    probs = np.stack([1 - scores, scores], axis=1)
    for tenths in range(1, 11):
        found = choose_threshold(Rule("sensitivity", sensitivity=tenths / 10), probs, np.ones(10, dtype=int))
        assert found.figures["sensitivity"] == tenths / 10


def test_youden_equals_scikit_learns_best_point() -> None:
    for probs, labels in cases():
        fpr, tpr, thresholds = roc_curve(labels, probs[:, 1], drop_intermediate=False)
        index = tpr - fpr
        found = choose_threshold(Rule.parse("youden"), probs, labels)
        sensitivity, specificity = found.figures["sensitivity"] or 0, found.figures["specificity"] or 0
        assert sensitivity + specificity - 1 == pytest.approx(max(index[1:]), abs=1e-12)
        assert found.value == min(thresholds[1:][index[1:] >= max(index[1:]) - 1e-12])  # [0] calls nothing positive


@pytest.mark.parametrize("costs", [(1, 1), (5, 1), (1, 20)])
def test_costs_equal_trying_every_threshold(costs: tuple[int, int]) -> None:
    for probs, labels in cases():
        found = choose_threshold(Rule.parse(f"costs={costs[0]}:{costs[1]}"), probs, labels).value

        def cost(threshold: float, probs: np.ndarray = probs, labels: np.ndarray = labels) -> float:
            called = probs[:, 1] >= threshold
            return costs[0] * (~called & (labels == 1)).sum() + costs[1] * (called & (labels == 0)).sum()

        tried = [(cost(t), t) for t in (*probs[:, 1], math.inf)]
        assert (cost(found), found) == min(tried)


def test_argmax_decides_as_argmax_does_ties_included() -> None:
    for probs, labels in cases():
        wanted = classification(probs, labels)
        found = choose_threshold(Rule.parse("argmax"), probs, labels)
        assert found.value == ARGMAX
        assert found.figures == {name: wanted[name] for name in found.figures}
    assert at_threshold([[0.5, 0.5]], [0], ARGMAX)["specificity"] == 1


@pytest.mark.parametrize("text", ["sensitivity=0.95", "youden", "costs=5:1", "costs=0.5:2", "argmax"])
def test_a_rule_reads_back_as_it_was_typed(text: str) -> None:
    assert str(Rule.parse(text)) == text
    assert Rule.parse(str(Rule.parse(text))) == Rule.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "best", "sensitivity", "sensitivity=0", "sensitivity=95", "sensitivity=nan", "costs=5", "costs=0:1",
     "costs=1:inf", "costs=a:b", "youden=3", "argmax=1"],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ConfigError, match=r"sensitivity=0.95 .* youden, costs=5:1 .* argmax; got"):
        Rule.parse(text)


def test_a_missing_class_is_named_where_the_rule_needs_it() -> None:
    probs = np.full((3, 2), 0.5)
    with pytest.raises(ConfigError, match=r"sensitivity=0.9: there is no positive image"):
        choose_threshold(Rule.parse("sensitivity=0.9"), probs, [0, 0, 0])
    with pytest.raises(ConfigError, match="no negative image"):
        choose_threshold(Rule.parse("youden"), probs, [1, 1, 1])
    assert choose_threshold(Rule.parse("sensitivity=0.9"), probs, [1, 1, 1]).value == 0.5


def test_more_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs two classes, these probabilities are of 3"):
        choose_threshold(Rule.parse("youden"), np.full((3, 3), 1 / 3), [0, 1, 2])


def test_a_threshold_as_plain_values() -> None:
    found = choose_threshold(Rule.parse("youden"), [[0.9, 0.1], [0.2, 0.8]], [0, 1]).to_dict()
    assert found == {
        "rule": "youden",
        "value": 0.8,
        "figures": {"oa": 1.0, "sensitivity": 1.0, "specificity": 1.0, "f1": 1.0},
    }
