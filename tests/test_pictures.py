"""Confusion and ROC pictures: what is drawn of predictions."""

import numpy as np
import pytest

from medtune.metrics import classification, softmax
from medtune.pictures import PICTURES, draw_confusion, draw_roc, png
from medtune.predictions import Predicted


def predicted(classes, count=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return Predicted((rng.normal(size=(count, classes)) + np.eye(classes)[labels]).astype(np.float32), labels)


def legend(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_counts_and_shares_stand_in_the_cells():
    logits = np.array([[2, 0], [0, 2], [0, 2], [2, 0], [0, 2]], dtype=np.float32)
    (panel,) = draw_confusion({"val": Predicted(logits, np.array([0, 0, 1, 1, 1]))}, ("normal", "ill"), "t").axes
    assert [text.get_text() for text in panel.texts] == ["1\n50%", "1\n50%", "1\n33%", "2\n67%"]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["normal", "ill"]


def test_two_classes_have_a_curve_for_each_split_with_its_auc():
    splits = {name: predicted(2, seed=seed) for seed, name in enumerate(("val", "external"))}
    (panel,) = draw_roc(splits, ("normal", "ill"), "t").axes
    areas = {name: classification(softmax(found.logits), found.labels)["auc"] for name, found in splits.items()}
    assert legend(panel) == [f"{name}: AUC {area:.3f}" for name, area in areas.items()]


def test_more_classes_have_a_panel_for_each_split():
    panels = draw_roc({"val": predicted(4), "test": predicted(4, seed=1)}, tuple("abcd"), "t").axes
    assert len(panels) == 2 and [line.partition(":")[0] for line in legend(panels[0])] == list("abcd")


def test_a_split_that_lacks_a_class_says_so():
    found = Predicted(predicted(2).logits[:5], np.ones(5, dtype=np.int64))
    (panel,) = draw_roc({"external": found}, ("normal", "ill"), "t").axes
    assert legend(panel) == ["external: undefined, a class is missing"]


@pytest.mark.parametrize("kind", PICTURES)
def test_they_are_png_files(kind):
    assert png(PICTURES[kind]({"val": predicted(3)}, tuple("abc"), "t")).startswith(b"\x89PNG")
