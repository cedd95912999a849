"""What low-rank codecs share: steps on paper and against brute force, sizes against the tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator
from deltaserve.codecs.directions import (
    FACTOR_BITS,
    Masks,
    largest_rank,
    low_rank,
    low_rank_bits,
    whole_low_rank,
)
from deltaserve_kernels.terms import SeededMask

EITHER: list[Estimator] = ["unbiased", "paper"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_signs_on_paper() -> None:
    """v = (1, −3): mean |v| = 2 is least squares, ‖v‖² / Σ|v| = 10/4 unbiased; u = (1, 1) is exact."""
    left, s, right = torch.ones(2, 1), torch.tensor([2.0]).double(), torch.tensor([[1.0, -3]])
    assert low_rank(left, s, right, 1, estimator="paper").decode().tolist() == [[4, -4], [4, -4]]
    assert low_rank(left, s, right, 1, estimator="unbiased").decode().tolist() == [[5, -5], [5, -5]]


def test_a_mask_on_paper() -> None:
    """Of v = (4, 4, 4, 4) two entries are left: both estimators double them."""
    mask = SeededMask(4, 1, 2, keep=2)
    for estimator in EITHER:
        term = low_rank(
            torch.ones(1, 1),
            torch.ones(1).double(),
            torch.full((1, 4), 4.0),
            2,
            masks=(None, mask),
            estimator=estimator,
        )
        assert sorted(term.decode().flatten().tolist()) == pytest.approx([0, 0, 8, 8])


@pytest.mark.parametrize("bits", FACTOR_BITS)
def test_each_direction_is_unbiased_along_itself(bits: int) -> None:
    left, right = normal(12, 3), normal(3, 40, seed=1)
    masks = (SeededMask(4, 1, 2, keep=3, stream=4), SeededMask(8, 1, 2, keep=3, stream=5))
    for chosen in ((None, None), masks):
        term = low_rank(left, torch.ones(3).double(), right, bits, masks=chosen)
        u, v = term.left.decode(), term.right.decode()
        along = (left * u).sum(0) * (right * v).sum(1) * term.s
        torch.testing.assert_close(along, left.square().sum(0) * right.square().sum(1))


def test_the_paper_divides_by_the_share_that_is_left() -> None:
    left, right = torch.ones(1, 1), normal(1, 64)
    mask = SeededMask(8, 1, 2, keep=2)
    s = torch.ones(1).double()
    whole, masked = (low_rank(left, s, right, 2, masks=(None, m), estimator="paper").decode() for m in (None, mask))
    columns = mask.columns(1, 64)
    torch.testing.assert_close(masked.gather(1, columns), 4 * whole.gather(1, columns))
    assert int((masked != 0).sum()) == 16


def test_two_bits_have_the_least_error_there_is() -> None:
    right = torch.tensor([[0.9, -0.2, 2.6, -3.1]])
    term = low_rank(torch.ones(1, 1), torch.ones(1).double(), right, 2, estimator="paper")
    error = float((term.decode() - right).square().sum())

    def least(levels: tuple[int, ...]) -> float:
        grid = torch.tensor(levels).float()
        return float((right - (right @ grid) / (grid @ grid) * grid).square().sum())

    assert error == pytest.approx(min(map(least, itertools.product((-3, -1, 1, 3), repeat=4))), rel=1e-4)


def test_a_direction_with_nothing_left_is_zero() -> None:
    mask = SeededMask(4, 1, 2)
    left = torch.zeros(2, 4)
    left[:, 0] = 1  # one of four columns a row is left
    term = low_rank(left, torch.ones(4).double(), normal(4, 8), 16, masks=(mask, None))
    assert bool(term.s.isfinite().all())
    assert term.s[1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", FACTOR_BITS)
@pytest.mark.parametrize("masks", [(None, None), (SeededMask(8, 1, 2, keep=3), SeededMask(16, 1, 2))], ids=str)
def test_the_size_is_that_of_the_tensors(bits: int, masks: Masks) -> None:
    term = low_rank(normal(13, 11), torch.ones(11).double(), normal(11, 45), bits, masks=masks)
    assert 8 * term.nbytes == low_rank_bits(13, 45, 11, bits, masks)


def test_whole_factors_are_kept_as_they_are() -> None:
    left, s, right = normal(5, 2), normal(2), normal(2, 7)
    term = whole_low_rank(left, s, right)
    assert torch.equal(term.left.codes, left.bfloat16())
    assert torch.equal(term.right.codes, right.bfloat16())
    assert 8 * term.nbytes == low_rank_bits(5, 7, 2)


@pytest.mark.parametrize("bits", FACTOR_BITS)
def test_the_largest_rank_fits_and_one_more_does_not(bits: int) -> None:
    for budget in (0, 500, 5_000, 20_000, 10**7):
        rank = largest_rank(budget, 33, 50, bits)
        assert rank == 1 or low_rank_bits(33, 50, rank, bits) <= budget
        assert rank == 33 or low_rank_bits(33, 50, rank + 1, bits) > budget
