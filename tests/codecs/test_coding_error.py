"""The three numbers of CodingError on vectors that fit on paper."""

from __future__ import annotations

import pytest
import torch

from deltaserve.codecs.base import CodingError

DELTA = torch.tensor([[3.0, 4.0]])


@pytest.mark.parametrize(
    ("decoded", "relative", "gain", "cosine"),
    [
        ([[3.0, 4.0]], 0, 1, 1),
        ([[6.0, 8.0]], 1, 2, 1),
        ([[0.0, 0.0]], 1, 0, 0),
        ([[-3.0, -4.0]], 2, -1, -1),
        ([[4.0, -3.0]], 2**0.5, 0, 0),
        ([[3.0, 0.0]], 0.8, 9 / 25, 0.6),
    ],
)
def test_on_paper(decoded: list[list[float]], relative: float, gain: float, cosine: float) -> None:
    error = CodingError.of(DELTA, torch.tensor(decoded))
    assert (error.relative, error.gain, error.cosine) == pytest.approx((relative, gain, cosine))


def test_nothing_coded_as_nothing_is_perfect() -> None:
    assert CodingError.of(torch.zeros(2, 2), torch.zeros(2, 2)) == CodingError(0, 1, 1)


def test_nothing_coded_as_something_is_infinitely_wrong() -> None:
    assert CodingError.of(torch.zeros(2, 2), torch.ones(2, 2)).relative == float("inf")


@pytest.mark.parametrize("magnitude", [1e-40, 1e30])
def test_squares_neither_overflow_nor_vanish(magnitude: float) -> None:
    error = CodingError.of(DELTA * magnitude, DELTA * magnitude * 2)
    assert (error.relative, error.gain, error.cosine) == pytest.approx((1, 2, 1), rel=1e-4)


def test_inputs_are_not_modified_whatever_their_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        delta, decoded = DELTA.to(dtype, copy=True), torch.ones(1, 2, dtype=dtype)
        CodingError.of(delta, decoded)
        assert delta.tolist() == [[3, 4]]
        assert decoded.tolist() == [[1, 1]]
