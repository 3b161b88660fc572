"""DeLong's test against its closed form, a bootstrap and simulation; Holm's correction against hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medtune.evidence.calibration import brier
from medtune.evidence.comparison import auc_covariance, delong, holm, paired_bootstrap
from medtune.metrics import resampled, softmax


def scored(gain: float, labels: np.ndarray, shared: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Probabilities of a classifier that sees partly what the others see."""
    scores = gain * labels + shared + 0.7 * rng.normal(size=len(labels))
    return softmax(np.stack([np.zeros(len(labels)), np.round(scores, 1)], axis=1))


def pair(seed: int, gain: float = 1.0, other: float = 1.0, count: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    shared = rng.normal(size=count)
    return scored(gain, labels, shared, rng), scored(other, labels, shared, rng), labels


def test_areas_equal_scikit_learn_with_ties() -> None:
    a, b, labels = pair(0)
    found = delong([a, b], labels)[0]
    assert found.a == pytest.approx(roc_auc_score(labels, a[:, 1]), abs=1e-12)
    assert found.b == pytest.approx(roc_auc_score(labels, b[:, 1]), abs=1e-12)
    assert found.difference == found.a - found.b


def test_the_covariance_equals_the_definition_over_all_pairs() -> None:
    """DeLong 1988: sample covariances of the structural components, psi = 1, 1/2 or 0 for each pair of images."""
    a, b, labels = pair(1)
    parts = []
    for probs in (a, b):
        positive, negative = probs[labels == 1, 1], probs[labels == 0, 1]
        psi = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        parts.append((psi.mean(axis=1), psi.mean(axis=0)))
    wanted = sum(np.cov(np.stack([one[side] for one in parts])) / len(parts[0][side]) for side in (0, 1))
    assert auc_covariance([a, b], labels)[1] == pytest.approx(wanted, abs=1e-15)


def test_the_error_of_the_difference_is_the_bootstraps() -> None:
    a, b, labels = pair(2, count=600)
    _, covariance = auc_covariance([a, b], labels)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    drawn = resampled(a, labels, 2000)["auc"] - resampled(b, labels, 2000)["auc"]
    assert error == pytest.approx(drawn.std(), rel=0.08)


def test_equal_classifiers_are_found_different_about_as_often_as_said() -> None:
    false_alarms = np.mean([delong((a, b), labels)[0].p < 0.05 for a, b, labels in map(pair, range(600))])
    assert 0.03 <= false_alarms <= 0.075


def test_better_is_found_better_and_the_other_way_round() -> None:
    a, b, labels = pair(3, gain=3.0, other=0.5)
    found, turned = delong([a, b], labels)[0], delong([b, a], labels)[0]
    assert found.p < 0.001 and found.low > 0
    assert turned.difference == -found.difference and turned.p == pytest.approx(found.p)


def test_the_same_classifier_and_perfect_ones_have_no_difference() -> None:
    a, _, labels = pair(4)
    assert delong([a, a], labels)[0][2:] == (0, 0, 0, 1)
    perfect = np.eye(2)[labels]
    assert delong([perfect, perfect], labels)[0].p == 1
    assert delong([perfect, 1 - perfect], labels)[0].p == 0


def test_more_classes_and_too_few_images_are_refused() -> None:
    three = np.full((4, 3), 1 / 3)
    with pytest.raises(ValueError, match="two classes, got 3"):
        delong([three, three], [0, 1, 2, 0])
    two = np.full((3, 2), 0.5)
    with pytest.raises(ValueError, match="2 images of each class, got 2 and 1"):
        delong([two, two], [0, 1, 0])


def test_a_paired_bootstrap_agrees_with_delong_on_the_auc() -> None:
    a, b, labels = pair(5, gain=1.6, other=1.0, count=400)
    drawn, exact = paired_bootstrap("auc", [a, b], labels, 2000)[0], delong([a, b], labels)[0]
    assert drawn[:3] == pytest.approx(exact[:3], abs=1e-12)
    assert drawn[3:5] == pytest.approx(exact[3:5], abs=0.006)
    assert abs(drawn.p - exact.p) < 0.03


def test_a_paired_bootstrap_of_any_figure_and_any_number_of_classes() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    good, poor = softmax(rng.normal(size=(90, 3)) + 3 * np.eye(3)[labels]), softmax(rng.normal(size=(90, 3)))
    found = paired_bootstrap(brier, [good, poor], labels, 200)[0]
    assert found.difference == brier(good, labels) - brier(poor, labels)
    assert found.high < 0 and found.p == pytest.approx(2 / 201)
    assert paired_bootstrap("auc", [good, good], labels, 200)[0][2:] == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="auc is undefined"):
        paired_bootstrap("auc", [good[:1], poor[:1]], [0])


def test_of_several_classifiers_the_mean_is_compared_and_of_several_groups_each_two() -> None:
    cases = [pair(6, gain=gain, count=500) for gain in (1.5, 1.2, 1.0)]
    groups, labels = [np.stack(one[:2]) for one in cases], cases[0][2]
    areas = [np.mean([roc_auc_score(labels, probs[:, 1]) for probs in group]) for group in groups]
    found, drawn = delong(groups, labels), paired_bootstrap("auc", groups, labels, 2000)
    for by_normal, by_resamples, (i, j) in zip(found, drawn, ((0, 1), (0, 2), (1, 2)), strict=True):
        assert by_normal[:3] == pytest.approx((areas[i], areas[j], areas[i] - areas[j]), abs=1e-12)
        assert by_resamples[:5] == pytest.approx(by_normal[:5], abs=0.006)
    twice = [np.stack([one, one]) for one in (groups[0][0], groups[1][0])]
    assert delong(twice, labels)[0] == pytest.approx(delong([one[0] for one in twice], labels)[0], abs=1e-9)


def test_holm_equals_hand_worked_numbers() -> None:
    """Of 0.01, 0.04, 0.03, 0.005: times 4, 3, 2, 1 from the smallest on, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []
