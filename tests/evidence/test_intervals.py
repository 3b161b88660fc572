"""Intervals of any figure: the same resamples for all of them."""

from __future__ import annotations

import numpy as np
import pytest

from medtune import metrics
from medtune.evidence.calibration import brier, ece
from medtune.evidence.intervals import Interval, calibration_figures, classified, interval, resampled
from medtune.evidence.threshold import at_threshold


def case(classes: int = 2, count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    return metrics.softmax(rng.normal(size=(count, classes)) + np.eye(classes)[labels]), labels


def test_a_name_and_the_same_figure_as_a_function_agree() -> None:
    probs, labels = case()
    by_function = interval(lambda p, t: metrics.classification(p, t)["auc"] or 0, probs, labels, 100)
    assert interval("auc", probs, labels, 100) == pytest.approx(by_function, abs=1e-12)
    assert interval("auc", probs, labels, 100)[1:] == pytest.approx(metrics.intervals(probs, labels, 100)["auc"])


def test_an_interval_is_that_of_the_plain_loop() -> None:
    probs, labels = case()
    drawn = [brier(probs[i], labels[i]) for i in metrics.resample_indices(labels, 80, 5)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    assert interval(brier, probs, labels, 80, 5) == Interval(brier(probs, labels), low, high)


def test_undefined_figures_have_no_interval() -> None:
    probs, _ = case()
    assert interval("auc", probs, np.ones(len(probs), dtype=int)) == Interval(None, None, None)
    assert interval("oa", probs, np.ones(len(probs), dtype=int), resamples=0)[1:] == (None, None)


def test_a_name_that_is_no_figure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"figure must be one of oa, .* got 'acc'"):
        interval("acc", *case())


@pytest.mark.parametrize("classes", [2, 3])
def test_all_figures_at_argmax_are_those_of_the_trial(classes: int) -> None:
    probs, labels = case(classes)
    found = classified(probs, labels, resamples=50)
    assert {name: one.value for name, one in found.items()} == metrics.classification(probs, labels)
    assert found["f1"][1:] == metrics.intervals(probs, labels, 50)["f1"]


def test_figures_at_a_threshold_have_the_interval_of_the_plain_loop() -> None:
    probs, labels = case()
    found = classified(probs, labels, at=0.7, resamples=60, seed=2)
    assert {name: one.value for name, one in found.items()} == at_threshold(probs, labels, 0.7)
    for name, one in found.items():
        drawn = [at_threshold(probs[i], labels[i], 0.7)[name] for i in metrics.resample_indices(labels, 60, 2)]
        assert one[1:] == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=1e-12)


def test_calibration_with_intervals() -> None:
    probs, labels = case(3)
    found = calibration_figures(probs, labels, resamples=50)
    assert found["ece"].value == ece(probs, labels) and found["brier"].value == brier(probs, labels)
    for name, figure in (("ece", ece), ("brier", brier)):
        drawn = [figure(probs[i], labels[i]) for i in metrics.resample_indices(labels, 50, 0)]
        assert found[name][1:] == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=1e-12)


def test_resamples_are_the_same_images_whatever_is_measured() -> None:
    probs, labels = case()
    right = resampled(lambda p, t: float((p.argmax(axis=1) == t).mean()), probs, labels, 40)
    assert right == pytest.approx(resampled("oa", probs, labels, 40), abs=1e-12)
