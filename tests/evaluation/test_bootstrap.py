"""Paired intervals: the textbook's width, nothing where nothing differs, the same figures every time."""

from __future__ import annotations

import pytest

from deltaserve.evaluation.bootstrap import Difference, bootstrap_difference


def test_the_same_hits_differ_by_nothing() -> None:
    hits = [True, False, True]
    assert bootstrap_difference(hits, hits) == Difference(0, 0, 0)


def test_the_interval_is_that_of_the_normal_distribution_where_rows_are_many() -> None:
    a, b = [True] * 300 + [False] * 700, [True] * 200 + [False] * 100 + [True] * 50 + [False] * 650
    mean, low, high = bootstrap_difference(a, b)
    half = 1.96 * ((0.1 + 0.05 - 0.05**2) / 1000) ** 0.5  # +1 in a tenth of the rows, −1 in a twentieth
    assert mean == pytest.approx(0.05)
    assert (low, high) == pytest.approx((0.05 - half, 0.05 + half), abs=2e-3)


def test_rows_are_paired() -> None:
    a = [True, False] * 50
    _, low, high = bootstrap_difference(a, [True, False] * 49 + [False, False])
    _, far_low, far_high = bootstrap_difference(a, [False, True] * 49 + [False, False])
    assert high - low < 0.05 < 0.3 < far_high - far_low


def test_a_seed_gives_the_same_interval_and_more_confidence_a_wider_one() -> None:
    a, b = [1.0, 0.5, 0, 0.25] * 10, [0.5, 1.0, 0, 0] * 10  # shares of hits over seeds
    assert bootstrap_difference(a, b) == bootstrap_difference(a, b)
    wide, narrow = bootstrap_difference(a, b, confidence=0.99), bootstrap_difference(a, b, confidence=0.5)
    assert wide.low < narrow.low < wide.mean < narrow.high < wide.high


@pytest.mark.parametrize(("a", "b"), [([True], [True, False]), ([], [])])
def test_other_rows_are_refused(a: list[bool], b: list[bool]) -> None:
    with pytest.raises(ValueError, match="the same rows"):
        bootstrap_difference(a, b)
