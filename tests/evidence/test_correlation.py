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


def test_the_interval_equals_hand_worked_numbers() -> None:
    """rho 0.5 of 8 pairs, a sum of squared differences of ranks of 42: tanh(atanh(0.5) -+ 1.96 sqrt((1 + 0.125) / 5))."""
    x, y = np.arange(8), [5, 0, 1, 4, 2, 6, 3, 7]
    assert spearmanr(x, y).statistic == pytest.approx(0.5) == rank_correlation(x, y).rho
    assert rank_correlation(x, y)[1:3] == pytest.approx((-0.3630, 0.9013), abs=1e-4)


@pytest.mark.parametrize(("count", "slope"), [(5, 0.9), (8, 0.0), (40, 0.5)])
def test_the_interval_holds_the_correlation_as_often_as_said(count: int, slope: float) -> None:
    """Of few pairs too, which are often all in one order where the correlation is strong."""
    truth, hits = 6 / np.pi * np.arcsin(slope / 2), 0
    for case in range(300):
        x, noise = np.random.default_rng(case).normal(size=(2, count))
        _, low, high, _ = rank_correlation(x, slope * x + np.sqrt(1 - slope**2) * noise)
        hits += (low or 0) <= truth <= (high or 0)
    assert hits / 300 >= 0.92


def test_pairs_in_one_order_have_an_interval_that_narrows_with_their_number() -> None:
    bounds = [rank_correlation(np.arange(n), np.arange(n)) for n in (3, 4, 8, 20)]
    assert bounds[0] == (pytest.approx(1), None, None, 3)
    lows = [one.low for one in bounds[1:]]
    assert lows == sorted(lows) and lows[0] < 0 < lows[1] and all(one.high < 1 for one in bounds[1:])


def test_what_is_not_finite_is_left_out_and_what_never_varies_is_undefined() -> None:
    nan = float("nan")
    assert rank_correlation([1, 2, nan, 4, 5], [5, 4, 3, 2, nan])[0::3] == (pytest.approx(-1), 3)
    assert rank_correlation([], []) == (None, None, None, 0)
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) == (None, None, None, 4)
    assert rank_correlation([1, 2], [1, 2]) == (None, None, None, 2)
