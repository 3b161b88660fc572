"""ASHA's decision, rung by rung."""

import math
import random

import pytest

from medtune.search.asha import Rung, keep


def order(values, reduction=2, minimise=True):
    """Who is kept when trials reach one rung in this order."""
    seen, kept = [], []
    for value in values:
        kept.append(keep(value, seen, reduction, minimise=minimise))
        seen.append(value)
    return kept


def test_first_arrival_always_goes_on():
    assert order([0.9]) == [True]


def test_best_half_so_far_goes_on():
    # 0.3 is 2nd of 3 (only 1 kept), 0.25 is 2nd of 4 (2 kept).
    assert order([0.5, 0.2, 0.3, 0.25, 0.1]) == [True, True, False, True, True]


def test_maximise_mirrors_minimise():
    values = [0.5, 0.2, 0.3, 0.25, 0.1]
    assert order([-v for v in values], minimise=False) == order(values)


def test_ties_go_to_the_earlier():
    assert order([0.5, 0.5, 0.5]) == [True, False, False]


@pytest.mark.parametrize("undefined", [None, math.nan, math.inf])
def test_undefined_never_goes_on_and_never_counts_as_good(undefined):
    assert order([undefined, 0.5, undefined]) == [False, True, False]


def test_larger_reduction_keeps_fewer():
    values = [0.9, 0.8, 0.7, 0.6, 0.65, 0.75]
    assert sum(order(values, 3)) <= sum(order(values, 2))
    assert order([0.1, 0.2, 0.3, 0.15], 4) == [True, False, False, False]


@pytest.mark.parametrize("minimise", [True, False])
@pytest.mark.parametrize("reduction", [2, 3])
def test_a_rung_kept_in_order_decides_as_a_walk_over_all_that_reached_it(reduction, minimise):
    rng = random.Random(reduction)
    values = [rng.choice((None, math.nan, math.inf, *(round(rng.random(), 1) for _ in range(9)))) for _ in range(300)]
    rung = Rung(reduction, minimise=minimise)
    kept = []
    for place, value in enumerate(values):
        assert rung.reached == place
        defined = value is not None and math.isfinite(value)
        earlier = [v for v in values[:place] if v is not None and math.isfinite(v)]
        better = [v for v in earlier if defined and (v <= value if minimise else v >= value)]
        kept.append(rung.keeps(value))
        assert kept[-1] == (defined and len(better) < max(1, (place + 1) // reduction))
        rung.add(value)
    assert 10 < sum(kept) < 290
