"""Figures and intervals against scikit-learn's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn import metrics as sk

from medtune import metrics

CASES = 60


def binary_cases() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Probabilities with and without ties, decisions of one class alone, one image of a class, saturated logits."""
    for case in range(CASES):
        rng = np.random.default_rng(case)
        count = int(rng.integers(2, 80))
        labels = (rng.random(count) < rng.choice([0.1, 0.5, 0.9])).astype(np.int64)
        labels[:2] = (0, 1)
        logits = rng.normal(rng.choice([-6, 0, 6]), rng.choice([0.5, 3, 300]), (count, 2))
        logits[:, 1] += labels
        yield metrics.softmax(np.round(logits, int(rng.integers(0, 4)))), labels


def expected(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    decided = probs.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "oa": sk.accuracy_score(labels, decided),
            "sensitivity": sk.recall_score(labels, decided),
            "specificity": sk.recall_score(labels, decided, pos_label=0),
            "f1": sk.f1_score(labels, decided),
            "auc": sk.roc_auc_score(labels, probs[:, 1]),
        }


def test_two_classes_equal_scikit_learn() -> None:
    for probs, labels in binary_cases():
        assert metrics.classification(probs, labels) == pytest.approx(expected(probs, labels), abs=1e-12, rel=0)


@pytest.mark.parametrize("classes", [3, 5])
def test_more_classes_equal_scikit_learns_macro_figures(classes: int) -> None:
    for case in range(20):
        rng = np.random.default_rng(case)
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 40)])
        probs = metrics.softmax(np.round(rng.normal(size=(len(labels), classes)), 1))
        decided = probs.argmax(axis=1)
        table = sk.multilabel_confusion_matrix(labels, decided, labels=range(classes))
        found = metrics.classification(probs, labels)
        assert found == pytest.approx(
            {
                "oa": sk.accuracy_score(labels, decided),
                "sensitivity": sk.recall_score(labels, decided, average="macro"),
                "specificity": np.mean(table[:, 0, 0] / table[:, 0].sum(axis=1)),
                "f1": sk.f1_score(labels, decided, average="macro"),
                "auc": sk.roc_auc_score(labels, probs, multi_class="ovr", average="macro"),
            },
            abs=1e-12,
            rel=0,
        )


@pytest.mark.parametrize("task", ["binary-class", "multi-class", "ordinal-regression"])
def test_figures_equal_medmnists_own(task: str) -> None:
    """What MedMNIST's published tables were made with."""
    from medmnist.evaluator import getACC, getAUC

    classes = 2 if task == "binary-class" else 5
    for case in range(10):
        rng = np.random.default_rng(case)
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 60)])
        probs = metrics.softmax(np.round(rng.normal(size=(len(labels), classes)), 1))
        found = metrics.classification(probs, labels)
        assert found["auc"] == pytest.approx(getAUC(labels[:, None], probs, task), abs=1e-12)
        assert found["oa"] == getACC(labels[:, None], probs, task)


def test_a_class_that_is_missing_leaves_macro_figures_missing() -> None:
    """A mean over the classes that happen to be there would not be comparable: only `oa` needs no class."""
    labels = np.array([0, 2, 2, 0])
    found = metrics.classification(metrics.softmax(np.random.default_rng(0).normal(size=(4, 3))), labels)
    assert found["oa"] is not None and [found[name] for name in metrics.NAMES[1:]] == [None] * 4
    assert set(metrics.undefined(labels, 3).values()) == {"no image of class 1"}


def test_auc_of_the_logit_equals_scikit_learn_and_is_not_that_of_the_probability() -> None:
    differs = 0
    for case in range(CASES):
        rng = np.random.default_rng(case)
        labels = np.append([0, 1], rng.integers(0, 2, 40))
        logits = np.round(rng.normal(size=(42, 2)) + labels[:, None] * [0.5, 1.0], 1)  # with ties
        found = metrics.auc_of_logit(logits, labels)
        assert found == pytest.approx(sk.roc_auc_score(labels, logits[:, 1]), abs=1e-12)
        differs += found != metrics.classification(metrics.softmax(logits), labels)["auc"]
    assert differs > CASES / 2
    assert metrics.auc_of_logit(logits, np.ones(42, dtype=int)) is None
    with pytest.raises(ValueError, match=r"\(N, 2\), got \(N, 3\)"):
        metrics.auc_of_logit(np.zeros((2, 3)), [0, 1])


def test_cross_entropy_equals_scikit_learns_log_loss() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    wanted = sk.log_loss(labels, metrics.softmax(logits))
    assert metrics.cross_entropy(logits, labels) == pytest.approx(wanted, abs=1e-12)
    assert metrics.cross_entropy([[1000.0, 0.0]], [1]) == 1000


@pytest.mark.parametrize(
    ("label", "missing"),
    [(0, {"sensitivity", "f1", "auc"}), (1, {"specificity", "auc"})],
)
def test_one_class_alone_leaves_figures_missing_with_the_reason(label: int, missing: set[str]) -> None:
    probs, labels = metrics.softmax(np.random.default_rng(0).normal(size=(9, 2))), np.full(9, label)
    found = metrics.classification(probs, labels)
    assert {name for name, value in found.items() if value is None} == missing
    assert metrics.undefined(labels) == dict.fromkeys(missing, f"no image of class {1 - label}")
    bounds = metrics.intervals(probs, labels, 20)
    assert {name for name, value in bounds.items() if value is None} == missing


def test_no_images_leave_all_figures_missing() -> None:
    assert metrics.classification(np.zeros((0, 2)), []) == dict.fromkeys(metrics.NAMES)
    assert metrics.undefined([]) == dict.fromkeys(metrics.NAMES, "no images")
    assert metrics.cross_entropy(np.zeros((0, 2)), []) is None


def test_a_class_that_is_never_decided_is_no_reason_to_miss_f1() -> None:
    probs, labels = np.array([[0.9, 0.1], [0.8, 0.2]]), [0, 1]
    assert metrics.classification(probs, labels)["f1"] == 0
    assert metrics.undefined(labels) == {}


@pytest.mark.parametrize("classes", [2, 3])
def test_intervals_equal_the_plain_loop_over_the_same_resamples(classes: int) -> None:
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 60)])
    probs = metrics.softmax(np.round(rng.normal(size=(len(labels), classes)), 1))
    drawn = metrics.resample_indices(labels, 150, seed=3)
    for indices in drawn:
        assert (np.bincount(labels[indices]) == np.bincount(labels)).all()
    one = expected if classes == 2 else metrics.classification
    values = [one(probs[indices], labels[indices]) for indices in drawn]
    for name, bounds in metrics.intervals(probs, labels, 150, seed=3).items():
        assert bounds == pytest.approx(np.percentile([value[name] for value in values], [2.5, 97.5]), abs=1e-12, rel=0)
    assert metrics.intervals(probs, labels, 150, seed=3) == metrics.intervals(probs, labels, 150, seed=3)
    assert metrics.intervals(probs, labels, 150, seed=3) != metrics.intervals(probs, labels, 150, seed=4)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits = 0
    for case in range(200):
        rng = np.random.default_rng(case)
        labels = np.arange(200) % 2
        probs = np.full((200, 2), 0.5)
        probs[:, 1] = np.where(rng.random(200) < 0.8, labels, 1 - labels)
        probs[:, 0] = 1 - probs[:, 1]
        low, high = metrics.intervals(probs, labels, 200, seed=case)["sensitivity"] or (1, 0)
        hits += low <= 0.8 <= high
    assert 0.9 <= hits / 200 <= 0.99


def test_no_resamples_give_no_intervals() -> None:
    probs, labels = next(binary_cases())
    assert metrics.intervals(probs, labels, 0) == dict.fromkeys(metrics.NAMES)


def test_roc_encloses_the_area_and_is_short() -> None:
    for probs, labels in binary_cases():
        curve = metrics.roc(probs, labels)
        assert sk.auc(curve["fpr"], curve["tpr"]) == pytest.approx(sk.roc_auc_score(labels, probs[:, 1]), abs=1e-12)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 5000)
    probs = metrics.softmax(rng.normal(size=(5000, 2)) + np.eye(2)[labels])
    curve = metrics.roc(probs, labels)
    assert 100 < len(curve["fpr"]) <= 200
    assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0, 0, 1, 1)
    assert sk.auc(curve["fpr"], curve["tpr"]) == pytest.approx(sk.roc_auc_score(labels, probs[:, 1]), abs=1e-3)
    assert metrics.roc(probs, np.ones(5000, dtype=int)) == {"fpr": [], "tpr": []}


def test_confusion_has_true_classes_as_rows() -> None:
    for probs, labels in binary_cases():
        assert (metrics.confusion(probs, labels) == sk.confusion_matrix(labels, probs.argmax(axis=1))).all()


def test_roc_of_each_of_more_classes() -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(4), rng.integers(0, 4, 200)])
    probs = metrics.softmax(np.round(rng.normal(size=(204, 4)) + np.eye(4)[labels], 1))
    areas = []
    for label in range(4):
        curve = metrics.roc(probs, labels, positive=label)
        areas.append(sk.auc(curve["fpr"], curve["tpr"]))
        assert areas[-1] == pytest.approx(sk.roc_auc_score(labels == label, probs[:, label]), abs=1e-12)
    assert metrics.classification(probs, labels)["auc"] == pytest.approx(np.mean(areas), abs=1e-12)


@pytest.mark.parametrize(
    ("probs", "labels", "says"),
    [
        (np.full((3, 2), np.nan), [0, 1, 0], "3 of 3 rows are not"),
        (np.full((3, 2), 0.5), [0, 1, 2], "labels must be 0 to 1, got 0 to 2"),
        (np.full((3, 2), 0.5), [0, 1], r"got \(3, 2\) and \(2,\)"),
        (np.full(3, 0.5), [0, 1, 0], r"got \(3,\) and \(3,\)"),
    ],
)
def test_what_cannot_be_judged_is_refused(probs: np.ndarray, labels: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        metrics.classification(probs, labels)
