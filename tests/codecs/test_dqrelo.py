"""D-QReLO: a matrix to check on paper, and the paper's two steps one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.dqrelo import DQReLO
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Coded, LowRank

SITE = Site(number=5, seed=7)

# mean |Δ| = 2, and what ±2 leaves is 1 · (1, 1)ᵀ(1, −1); Σ Δ² / Σ |Δ| = 20 / 8
PAPER_SIZED = torch.tensor([[3.0, 1], [-1, -3]])


def encode(codec: DQReLO, delta: Tensor) -> tuple[Coded, LowRank]:
    signs, factors = codec.encode(delta, SITE)
    assert isinstance(signs, Coded)
    assert isinstance(factors, LowRank)
    return signs, factors


def matrix(rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    strong = torch.randn(rows, 4, generator=generator) @ torch.randn(4, cols, generator=generator)
    return strong + 0.3 * torch.randn(rows, cols, generator=generator)


def test_on_paper() -> None:
    signs, factors = encode(DQReLO(bits=32, factor_bits=1, estimator="paper"), PAPER_SIZED)
    assert signs.decode().tolist() == [[2, 2], [-2, -2]]
    torch.testing.assert_close(factors.decode(), torch.tensor([[1.0, -1], [1, -1]]))
    signs, _ = encode(DQReLO(bits=32), PAPER_SIZED)
    assert signs.decode().tolist() == [[2.5, 2.5], [-2.5, -2.5]]


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)], ids=str)
def test_the_paper_step_by_step(shape: tuple[int, int]) -> None:
    delta = matrix(*shape)
    signs, factors = encode(DQReLO(bits=4, estimator="paper"), delta)
    first = delta.abs().mean() * delta.sign()
    torch.testing.assert_close(signs.decode(), first)
    u, sigma, vt = torch.linalg.svd(delta - first, full_matrices=False)
    rank = len(factors.s)
    best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    torch.testing.assert_close(factors.decode(), best, rtol=0, atol=0.02 * float(best.abs().max()))


def test_signs_alone_are_unbiased_along_delta() -> None:
    delta = matrix(40, 64)
    signs, _ = encode(DQReLO(), delta)
    assert CodingError.of(delta, signs.decode()).gain == pytest.approx(1)


def test_zeros_draw_their_signs() -> None:
    """A fine-tune has whole rows that did not move: they must not all go one way."""
    delta = matrix(64, 64)
    delta[:32] = 0
    signs, _ = encode(DQReLO(), delta)
    assert abs(float(signs.decode()[:32].sign().mean())) < 0.1
    other = decode(DQReLO().encode(delta, Site(number=5, seed=8))[:1])
    assert not torch.equal(other, signs.decode())


@pytest.mark.parametrize("factor_bits", [1, 2, 3, 4, 5, 8, 16])
def test_the_factors_have_what_the_signs_leave_of_the_budget(factor_bits: int) -> None:
    delta = matrix(40, 64)
    ranks = {}
    for bits in (2.5, 3.0):
        signs, factors = encode(DQReLO(bits=bits, factor_bits=factor_bits), delta)
        assert 8 * (signs.nbytes + factors.nbytes) <= bits * delta.numel()
        assert factors.left.bits == factor_bits
        ranks[bits] = len(factors.s)
    assert ranks[2.5] < ranks[3.0] <= 40


def test_fewer_bits_a_factor_and_more_directions_come_closer() -> None:
    delta = matrix(40, 64)
    errors = [CodingError.of(delta, decode(DQReLO(3.0, bits).encode(delta, SITE))).relative for bits in (16, 4)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        (Budget(bits=1), {}, ["--bits 1", "1.112", "192 × 576"]),
        (Budget(bits=40), {}, ["bits 40", "0 … 32"]),
        (Budget(), {"factor_bits": 6}, ["factor_bits 6", "1, 2, 3, 4, 5, 8, 16"]),
        (Budget(), {"estimator": "best"}, ["estimator 'best'", "unbiased", "paper"]),
        (Budget(rank=3), {}, ["--rank"]),
    ],
)
def test_what_is_refused(budget: Budget, options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(CodecError) as caught:
        make_codec("dqrelo", budget, options)
    assert all(part in caught.value.message for part in says)
