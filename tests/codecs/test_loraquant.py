"""LoRAQuant: a matrix to check on paper, and where the directions are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.loraquant import LoRAQuant
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import LowRank

SITE = Site(number=5, seed=7)

# 5 · (1, 1)ᵀ(1, 1, 1, 1) + (1, −1)ᵀ(1, −1, 1, −1): σ = 5√8, √8; every direction has entries of one size
PAPER_SIZED = torch.tensor([[6.0, 4, 6, 4], [4, 6, 4, 6]])


def encode(codec: LoRAQuant, delta: Tensor) -> list[LowRank]:
    terms = codec.encode(delta, SITE)
    assert all(isinstance(term, LowRank) for term in terms)
    return [term for term in terms if isinstance(term, LowRank)]


def widths(terms: list[LowRank]) -> list[tuple[int, int]]:
    """(bits, directions) of each term."""
    assert all(term.left.bits == term.right.bits for term in terms)
    return [(term.left.bits, len(term.s)) for term in terms]


def matrix(rows: int = 48, cols: int = 80) -> Tensor:
    """Singular values that fall like 1/k."""
    generator = torch.Generator().manual_seed(rows)
    u, _, vt = torch.linalg.svd(torch.randn(rows, cols, generator=generator), full_matrices=False)
    decayed: Tensor = (u / torch.arange(1, min(rows, cols) + 1)) @ vt
    return decayed


@pytest.mark.parametrize("estimator", ["unbiased", "paper"])
def test_on_paper(estimator: Any) -> None:
    terms = encode(LoRAQuant(bits=1000, coverage=0.8, estimator=estimator), PAPER_SIZED)
    assert widths(terms) == [(2, 1), (1, 1)]
    torch.testing.assert_close(terms[0].decode(), torch.full((2, 4), 5.0))
    torch.testing.assert_close(decode(terms), PAPER_SIZED)


@pytest.mark.parametrize(
    ("coverage", "split"),
    [(0.0, [(1, 2)]), (0.83, [(2, 1), (1, 1)]), (0.84, [(2, 2)]), (1.0, [(2, 2)])],
)
def test_coverage_on_paper(coverage: float, split: list[tuple[int, int]]) -> None:
    """The first direction has 5/6 of Σσ."""
    assert widths(encode(LoRAQuant(bits=1000, coverage=coverage), PAPER_SIZED)) == split


@pytest.mark.parametrize("coverage", [0.3, 0.6, 0.9])
def test_the_high_directions_are_the_fewest_that_cover(coverage: float) -> None:
    delta = matrix()
    terms = encode(LoRAQuant(bits=1.5, coverage=coverage, high_bits=3), delta)
    (_, high), (_, low) = widths(terms)
    sigma = torch.linalg.svdvals(delta.double())[: high + low]
    assert float(sigma[:high].sum()) >= coverage * float(sigma.sum())
    assert float(sigma[: high - 1].sum()) < coverage * float(sigma.sum())


@pytest.mark.parametrize("bits", [0.4, 1.0, 1.7])
def test_the_rank_is_the_largest_that_fits(bits: float) -> None:
    """Against every rank in turn, by formula."""
    delta = matrix()
    terms = encode(LoRAQuant(bits=bits), delta)
    sigma = torch.linalg.svdvals(delta.double())

    def size(rank: int) -> int:
        total = sigma[:rank].sum() * 0.9
        strong = next(h for h in range(1, rank + 1) if float(sigma[:h].sum()) >= float(total))
        weak = rank - strong
        rows = 48 * (-(-2 * strong // 8) - (-weak // 8)) + strong * 20 + weak * 10  # bytes
        return 8 * rows + 32 * rank

    fitting = [rank for rank in range(1, 49) if size(rank) <= bits * delta.numel()]
    assert sum(len(term.s) for term in terms) == max(fitting)
    assert 8 * sum(term.nbytes for term in terms) == size(max(fitting))


def test_directions_are_unbiased_along_themselves() -> None:
    delta = matrix()
    u, sigma, vt = torch.linalg.svd(delta, full_matrices=False)
    decoded = decode(encode(LoRAQuant(bits=100), delta))
    along = ((u.T @ decoded) * vt).sum(1) / sigma
    assert along.mean() == pytest.approx(1, abs=0.05)  # each is 1 by itself; the others add noise
    paper = decode(encode(LoRAQuant(bits=100, coverage=0, estimator="paper"), delta))
    assert CodingError.of(delta, paper).gain < 0.6  # signs of both factors keep (2/π)²


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        (Budget(bits=0.02), {}, ["--bits 0.02", "0.02459", "192 × 576"]),
        (Budget(), {"bits": 0.0}, ["bits 0.0", "> 0"]),
        (Budget(), {"coverage": 1.5}, ["coverage 1.5", "0 … 1"]),
        (Budget(), {"high_bits": 4}, ["high_bits 4", "2 or 3"]),
        (Budget(), {"estimator": "best"}, ["estimator 'best'", "unbiased", "paper"]),
        (Budget(energy=0.5), {}, ["--energy"]),
    ],
)
def test_what_is_refused(budget: Budget, options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(CodecError) as caught:
        make_codec("loraquant", budget, options)
    assert all(part in caught.value.message for part in says)
