"""Temperature, calibration error and Brier score against scikit-learn and simulations of known calibration."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from medtune.evidence.calibration import TEMPERATURES, brier, calibrated, ece, fit_temperature, reliability
from medtune.metrics import cross_entropy, softmax


def simulated(classes: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn with exactly their probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes))
    drawn = softmax(logits).cumsum(axis=1) < rng.random(count)[:, None]
    return logits, drawn.sum(axis=1).clip(max=classes - 1)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_of_scaled_logits_is_found(classes: int, scale: float) -> None:
    logits, labels = simulated(classes, 40_000)
    assert fit_temperature(logits * scale, labels) == pytest.approx(scale, rel=0.05)


def test_no_temperature_beside_it_is_better() -> None:
    logits, labels = simulated(3, 500)
    found = fit_temperature(logits * 3, labels)
    losses = [cross_entropy(logits * 3 / (found * factor), labels) or 0 for factor in (0.99, 1, 1.01)]
    assert losses[1] < min(losses[0], losses[2])


def test_logits_that_are_always_right_stay_and_those_that_mean_nothing_give_the_limit() -> None:
    labels = np.arange(50) % 2
    assert fit_temperature(3 * np.eye(2)[labels], labels) == 1.0
    assert fit_temperature(np.eye(2)[1 - labels], labels) == pytest.approx(TEMPERATURES[1], rel=1e-3)


@pytest.mark.parametrize("classes", [2, 4])
def test_calibrated_probabilities_have_hardly_an_error_and_too_sure_ones_do(classes: int) -> None:
    logits, labels = simulated(classes, 40_000)
    assert ece(softmax(logits), labels) < 0.01
    assert ece(softmax(logits * 4), labels) > 0.05
    assert ece(calibrated(logits * 4, fit_temperature(logits * 4, labels)), labels) < 0.01


def test_calibration_changes_no_decision_and_no_order() -> None:
    logits, _ = simulated(2, 300)
    before, after = softmax(logits), calibrated(logits, 2.5)
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()
    assert (before[:, 1].argsort() == after[:, 1].argsort()).all()


def test_the_error_of_hand_made_bins() -> None:
    """Two bins: 0.2 on average with nothing positive; 0.8 with three of four: (2 * 0.2 + 4 * 0.05) / 6."""
    positive = np.array([0.1, 0.3, 0.7, 0.8, 0.8, 0.9])
    probs = np.stack([1 - positive, positive], axis=1)
    assert ece(probs, [0, 0, 1, 0, 1, 1], bins=2) == pytest.approx((2 * 0.2 + 4 * 0.05) / 6)


def test_more_classes_are_judged_by_the_decided_one() -> None:
    probs = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    assert ece(probs, [0, 1]) == pytest.approx(0.1)  # 0.6 on average, half of them right


@pytest.mark.parametrize("classes", [2, 3])
def test_brier_equals_scikit_learn(classes: int) -> None:
    logits, labels = simulated(classes, 200)
    probs = softmax(logits)
    wanted = brier_score_loss(labels, probs[:, 1] if classes == 2 else probs)
    assert brier(probs, labels) == pytest.approx(wanted, abs=1e-12)


def test_the_diagram_equals_scikit_learn_and_its_bands_hold_it() -> None:
    logits, labels = simulated(2, 3000)
    probs = softmax(logits)
    found = reliability(probs, labels, bins=10)
    observed, confidence = calibration_curve(labels, probs[:, 1], n_bins=10)
    assert found.observed == pytest.approx(observed, abs=1e-12)
    assert found.confidence == pytest.approx(confidence, abs=1e-12)
    assert found.images.sum() == 3000
    assert (found.low < found.observed).all() and (found.observed < found.high).all()
    assert ((found.low < found.confidence) & (found.confidence < found.high)).mean() >= 0.8


def test_empty_bins_are_nan_and_certainty_falls_into_the_last() -> None:
    found = reliability([[0.0, 1.0], [1.0, 0.0]], [1, 0], bins=3)
    assert found.images.tolist() == [1, 0, 1]
    assert np.isnan(found.observed[1]) and np.isnan(found.low[1])


@pytest.mark.parametrize("judge", [ece, brier, reliability, fit_temperature])
def test_no_images_and_no_bins_are_refused(judge: object) -> None:
    with pytest.raises(ValueError, match="needs images"):
        judge(np.zeros((0, 2)), [])  # type: ignore[operator]
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        ece([[0.5, 0.5]], [0], bins=0)
