"""BitDelta: numbers to check on paper, the two estimators, the sign of zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.bitdelta import Axis, BitDelta
from deltaserve_kernels.terms import Coded

SITE = Site(number=5, seed=7)

# Σ|Δ| = 12, ΣΔ² = 24; by row 8, 20 and 4, 4; by column 4, 10 · 2, 2 · 2, 2 · 4, 10
PAPER_SIZED = torch.tensor([[3.0, -1, 1, -3], [1, 1, -1, -1]])


def encode(codec: BitDelta, delta: Tensor) -> Coded:
    (term,) = codec.encode(delta, SITE)
    assert isinstance(term, Coded)
    return term


def test_the_stored_bits_are_the_signs_first_column_lowest() -> None:
    assert encode(BitDelta(), PAPER_SIZED).codes.tolist() == [[0b0101], [0b0011]]


@pytest.mark.parametrize(
    ("codec", "alpha"),
    [
        (BitDelta("tensor", "paper"), [[1.5]]),
        (BitDelta("tensor", "unbiased"), [[2.0]]),
        (BitDelta("row", "paper"), [[2.0], [1.0]]),
        (BitDelta("row", "unbiased"), [[2.5], [1.0]]),
        (BitDelta("col", "paper"), [[2.0, 1.0, 1.0, 2.0]]),
        (BitDelta("col", "unbiased"), [[2.5, 1.0, 1.0, 2.5]]),
    ],
    ids=str,
)
def test_the_scales_on_paper(codec: BitDelta, alpha: list[list[float]]) -> None:
    assert torch.equal(decode([encode(codec, PAPER_SIZED)]), PAPER_SIZED.sign() * torch.tensor(alpha))


def test_scales_are_stored_as_documented() -> None:
    tensor, row, col = (encode(BitDelta(axis), PAPER_SIZED) for axis in ("tensor", "row", "col"))
    assert tensor.row is not None and (tensor.row.dtype, tensor.row.shape) == (torch.float32, ())
    assert row.row is not None and (row.row.dtype, row.row.shape) == (torch.bfloat16, (2, 1))
    assert col.col is not None and (col.col.dtype, col.col.shape) == (torch.bfloat16, (4,))
    assert col.row is None and tensor.col is None and row.col is None


@pytest.mark.parametrize(("axis", "tolerance"), [("tensor", 1e-5), ("row", 2**-9), ("col", 2**-9)])
def test_unbiased_keeps_the_whole_of_delta_along_itself(axis: Axis, tolerance: float) -> None:
    delta = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) ** 3
    delta[::5, ::3] = 0
    error = CodingError.of(delta, decode(BitDelta(axis).encode(delta, SITE)))
    assert error.gain == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("axis", ["tensor", "row", "col"])
def test_paper_is_least_squares_and_keeps_less(axis: Axis) -> None:
    delta = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    paper, ours = (CodingError.of(delta, decode(BitDelta(axis, e).encode(delta, SITE))) for e in ("paper", "unbiased"))
    assert paper.relative < ours.relative
    assert paper.gain == pytest.approx(2 / torch.pi, abs=0.03)  # (E|z|)² of a normal z


def test_zeros_are_positive_in_the_papers_code() -> None:
    delta = torch.tensor([[0.0, -1, -0.0, -1]])
    assert encode(BitDelta("tensor", "paper"), delta).codes.tolist() == [[0b0101]]


def test_zeros_are_drawn_fairly_when_unbiased() -> None:
    delta = torch.zeros(100, 100)
    delta[0, 0] = 1
    signs = decode(BitDelta().encode(delta, SITE)).sign()
    assert signs[0, 0] == 1
    assert abs(float(signs.sum())) < 4 * 100  # 4 σ of 10⁴ fair draws


def test_the_draw_of_zeros_depends_on_seed_and_site_and_changes_no_other_sign() -> None:
    delta = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    delta[:, ::2] = 0
    first, *others = (decode(BitDelta().encode(delta, Site(n, s))) for n, s in [(5, 7), (5, 8), (6, 7)])
    for other in others:
        assert torch.equal(first[:, 1::2], other[:, 1::2])
        assert not torch.equal(first, other)
