"""Generated images: fixed by their seed, two domains, learnable, marked."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from medtune.data import load_pair
from medtune.data.pairs import synthetic


def test_marked_everywhere() -> None:
    pair = load_pair("synthetic")
    assert pair.synthetic and not pair.verified_cpn and pair.external_name == "synthetic"
    assert any("synthetic" in warning for warning in pair.warnings)
    assert all("synthetic" in mark for mark in pair.fingerprint.values())


def test_fixed_by_the_seed() -> None:
    first, other = synthetic.generate(0), synthetic.generate(4)
    synthetic.generate.cache_clear()
    again = synthetic.generate(0)
    assert again is not first
    for name in ("train", "val", "test", "external"):
        images = getattr(first, name).images
        assert np.array_equal(images, getattr(again, name).images)
        assert not np.array_equal(images, getattr(other, name).images)
    assert first.fingerprint != other.fingerprint


@pytest.mark.parametrize("native_size", [28, 64, 128, 224])
def test_shapes_of_the_real_sets(native_size: int) -> None:
    begin = time.process_time()
    pair = load_pair("synthetic", native_size=native_size)
    assert time.process_time() - begin < 4  # under 2 s of one core where nothing else runs
    assert pair.train.images.shape == (1024, 1, native_size, native_size)
    assert pair.external.images.shape == (400, 1, 256, 256)
    assert pair.counts() == {name: counts for name, counts in synthetic.SIZES.items()}
    begin = time.process_time()
    assert load_pair("synthetic", native_size=native_size) is pair
    assert time.process_time() - begin < 0.05


def test_learnable_but_not_trivial() -> None:
    """A linear model on pixels learns something and is far from perfect; brightness alone tells little."""
    pair = load_pair("synthetic")
    x, y = pair.train.images.reshape(1024, -1) / 255, pair.train.labels
    model = LogisticRegression(C=0.01, max_iter=300).fit(x, y)
    auc = roc_auc_score(pair.test.labels, model.decision_function(pair.test.images.reshape(256, -1) / 255))
    assert 0.6 < auc < 0.97
    brightness = roc_auc_score(pair.test.labels, pair.test.images.mean((1, 2, 3)))
    assert brightness < 0.75


def test_the_external_set_is_another_domain() -> None:
    """Sharper and of other contrast at the same size."""
    pair = load_pair("synthetic")
    outside = pair.external.images.reshape(400, 1, 32, 8, 32, 8)[:, :, :28, :, :28].mean((3, 5))
    inside = pair.train.images.astype(float)
    assert abs(outside.std((1, 2, 3)).mean() - inside.std((1, 2, 3)).mean()) > 3
