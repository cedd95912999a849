"""Delta-SVD: numbers to check on paper, and the truncation that torch.linalg.svd makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.delta_svd import DeltaSvd
from deltaserve_kernels.terms import LowRank

SITE = Site(number=5, seed=7)

# Orthogonal rows: σ = 4, 2; ‖Δ‖² = 16 + 4
PAPER_SIZED = torch.tensor([[2.0, 2, 2, 2], [1, -1, 1, -1]])


def encode(codec: DeltaSvd, delta: Tensor) -> LowRank:
    (term,) = codec.encode(delta, SITE)
    assert isinstance(term, LowRank)
    return term


def matrix(rows: int, cols: int) -> Tensor:
    """Singular values that fall like a fine-tune's: a few strong directions and a floor."""
    generator = torch.Generator().manual_seed(rows)
    strong = torch.randn(rows, 4, generator=generator) @ torch.randn(4, cols, generator=generator)
    return strong + 0.3 * torch.randn(rows, cols, generator=generator)


def test_rank_one_on_paper() -> None:
    term = encode(DeltaSvd(rank=1), PAPER_SIZED)
    assert term.s.tolist() == pytest.approx([4])
    assert term.left.codes.abs().tolist() == [[1], [0]]
    assert term.right.codes.abs().tolist() == [[0.5] * 4]
    torch.testing.assert_close(term.decode(), torch.tensor([[2.0, 2, 2, 2], [0, 0, 0, 0]]))


def test_rank_two_on_paper_is_everything() -> None:
    for delta in (PAPER_SIZED, PAPER_SIZED.T):
        term = encode(DeltaSvd(rank=2), delta)
        assert term.s.tolist() == pytest.approx([4, 2])
        torch.testing.assert_close(term.decode(), delta)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.79, 1), (0.81, 2), (1.0, 2)])
def test_energy_on_paper(energy: float, rank: int) -> None:
    """The first direction holds 16/20."""
    assert len(encode(DeltaSvd(energy=energy), PAPER_SIZED).s) == rank


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (33, 33)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    delta = matrix(*shape)
    sigma = torch.linalg.svdvals(delta.double())
    best = float(sigma[rank:].norm() / sigma.norm())
    error = CodingError.of(delta, decode(DeltaSvd(rank=rank).encode(delta, SITE)))
    assert error.relative == pytest.approx(best, rel=0.01)
    torch.testing.assert_close(encode(DeltaSvd(rank=rank), delta).s, sigma[:rank].float())


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_energy_keeps_its_share_with_the_smallest_rank(energy: float) -> None:
    delta = matrix(20, 50)
    power = torch.linalg.svdvals(delta.double()) ** 2
    shares = power.cumsum(0) / power.sum()
    rank = len(encode(DeltaSvd(energy=energy), delta).s)
    assert float(shares[rank - 1]) >= energy - 1e-9
    assert rank == 1 or float(shares[rank - 2]) < energy
    error = CodingError.of(delta, decode(DeltaSvd(energy=energy).encode(delta, SITE)))
    assert 1 - error.relative**2 >= energy - 1e-3  # the factors are bfloat16


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (1, 30), (30, 1)], ids=str)
def test_full_rank_restores_delta_to_bfloat16(shape: tuple[int, int]) -> None:
    delta = matrix(*shape)
    error = CodingError.of(delta, decode(DeltaSvd(rank=10_000).encode(delta, SITE)))
    assert error.relative < 2**-8


def test_bits_give_the_largest_rank_that_fits() -> None:
    delta = matrix(64, 96)
    for bits in (1.0, 2.5, 6.0):
        rank = len(encode(DeltaSvd(bits=bits), delta).s)
        assert 8 * encode(DeltaSvd(rank=rank), delta).nbytes <= bits * delta.numel()
        assert 8 * encode(DeltaSvd(rank=rank + 1), delta).nbytes > bits * delta.numel()


def test_bits_too_few_for_one_direction_still_keep_one() -> None:
    assert len(encode(DeltaSvd(bits=0.01), matrix(20, 50)).s) == 1


def test_directions_that_are_not_there_are_not_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-3, 4, shape, generator=generator).float() for shape in [(30, 2), (2, 50)])
    delta = left @ right
    assert len(encode(DeltaSvd(rank=16), delta).s) == 2


def test_factors_are_stored_as_documented() -> None:
    term = encode(DeltaSvd(rank=3), matrix(20, 50))
    assert (term.left.codes.dtype, term.left.codes.shape) == (torch.bfloat16, (20, 3))
    assert (term.right.codes.dtype, term.right.codes.shape) == (torch.bfloat16, (3, 50))
    assert (term.s.dtype, term.s.shape) == (torch.float32, (3,))
