"""Which rows belong to which slot."""

from __future__ import annotations

import pytest

from deltaserve_kernels.segments import Segment, Segments


def test_runs_of_equal_slot_become_segments() -> None:
    assert Segments.of([0, 0, 2, 5, 5, 5]).runs == (Segment(0, 0, 2), Segment(2, 2, 3), Segment(5, 3, 6))


def test_base_rows_make_no_run_wherever_they_stand() -> None:
    assert Segments.of([-1, -1, -1]).runs == ()
    assert Segments.of([-1, 0, 0, 1]).runs == (Segment(0, 1, 3), Segment(1, 3, 4))
    assert Segments.of([3, -1, -1, 4]).runs == (Segment(3, 0, 1), Segment(4, 3, 4))


def test_one_row_is_one_run() -> None:
    assert Segments.of([7]).runs == (Segment(7, 0, 1),)


def test_an_empty_step_has_no_runs() -> None:
    assert Segments.of([]).runs == ()


@pytest.mark.parametrize("slots", [[0, 1, 0], [0, -1, 0], [2, 2, 1, 1, 2]])
def test_a_slot_that_comes_twice_is_refused(slots: list[int]) -> None:
    with pytest.raises(ValueError, match="not sorted by slot"):
        Segments.of(slots)


def test_a_negative_slot_other_than_base_is_refused() -> None:
    """It would address the slot table from its end: another tenant's delta."""
    with pytest.raises(ValueError, match="−1"):
        Segments.of([-2, 0])
