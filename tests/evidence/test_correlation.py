"""Rank correlation against SciPy's and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from medtune.evidence.correlation import rank_correlation


def test_rho_equals_scipy_with_ties() -> None:
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=60), 1)
    y = np.round(x + rng.normal(size=60), 1)
    found = rank_correlation(x, y)
    assert found.rho == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert found.n == 60


def test_the_interval_equals_the_plain_loop() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 20))
    drawn = np.random.default_rng(7).integers(0, 20, (200, 20))
    wanted = np.percentile([spearmanr(x[i], y[i]).statistic for i in drawn], (2.5, 97.5))
    assert rank_correlation(x, y, 200, 7)[1:3] == pytest.approx(wanted, abs=1e-12)


def test_the_interval_covers_no_correlation_nearly_as_often_as_said() -> None:
    hits = 0
    for case in range(200):
        x, y = np.random.default_rng(case).normal(size=(2, 40))
        _, low, high, _ = rank_correlation(x, y, 300)
        hits += (low or 0) <= 0 <= (high or 0)
    assert 0.88 <= hits / 200 <= 0.99


def test_what_is_not_finite_is_left_out_and_what_never_varies_is_undefined() -> None:
    nan = float("nan")
    assert rank_correlation([1, 2, nan, 4, 5], [5, 4, 3, 2, nan])[0::3] == (pytest.approx(-1), 3)
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) == (None, None, None, 4)
    assert rank_correlation([1, 2], [1, 2]) == (None, None, None, 2)
