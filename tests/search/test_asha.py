"""ASHA's decision, rung by rung."""

import math

import pytest

from medtune.search.asha import keep


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
