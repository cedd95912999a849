"""SliM-LLM: bits by block on paper, the search against brute force, steps, what the second order buys."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from deltaserve.codecs.base import Site, decode
from deltaserve.codecs.slim import Slim
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, Placed, Term


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def gram_of(cols: int) -> torch.Tensor:
    inputs = matrix(4 * cols, cols, seed=1) @ matrix(cols, cols, seed=2) / cols**0.5 + 0.5
    return inputs.T @ inputs / len(inputs)


def encode(codec: Slim, delta: torch.Tensor, gram: torch.Tensor | None = None) -> list[Term]:
    return codec.encode(delta, Site(5, 7, gram))


def widths(terms: list[Term], blocks: int) -> list[int]:
    """Bits of each block."""
    found = [0] * blocks
    for term in terms:
        inner = term.term if isinstance(term, Placed) else term
        assert isinstance(inner, Coded)
        present = layout.unpack(term.present, 1, blocks).tolist() if isinstance(term, Placed) else [1] * blocks
        found = [inner.bits if here else width for here, width in zip(present, found, strict=True)]
    return found


def test_the_salient_block_gets_a_bit_of_the_least_salient_one() -> None:
    delta = matrix(16, 96) * torch.tensor([1.0, 0.1, 10.0]).repeat_interleave(32)
    terms = encode(Slim(2, 32), delta)
    assert [term.term.bits for term in terms if isinstance(term, Placed) and isinstance(term.term, Coded)] == [1, 2, 3]
    assert widths(terms, 3) == [2, 1, 3]


def test_blocks_alike_stay_alike_and_are_one_plain_term() -> None:
    (term,) = encode(Slim(2, 32), matrix(64, 160))
    assert isinstance(term, Coded)
    assert (term.bits, term.group) == (2, 32)


def test_a_short_last_block_keeps_its_bits_so_that_the_mean_stays() -> None:
    scales = torch.cat((torch.tensor([1.0, 10, 0.1, 3]).repeat_interleave(32), torch.full((20,), 100.0)))
    found = widths(encode(Slim(2, 32), matrix(16, 148) * scales), 5)
    assert found[4] == 2
    assert sum(found) == 10
    assert found[1] == 3 and found[2] == 1


def test_a_block_of_no_bits_is_absent() -> None:
    delta = matrix(16, 96) * torch.tensor([1.0, 0.1, 10.0]).repeat_interleave(32)
    terms = encode(Slim(1, 32), delta)
    assert widths(terms, 3) == [1, 0, 2]
    assert not decode(terms)[:, 32:64].any()


def test_the_shift_has_the_least_error_of_all() -> None:
    """Six blocks of rising salience, all four shifts by brute force under plain rounding."""
    gram = torch.eye(192)
    delta = matrix(8, 192) * 1.3 ** torch.arange(6).repeat_interleave(32)
    found = widths(encode(Slim(2, 32), delta, gram), 6)
    assert all(low <= high for low, high in pairwise(found))
    blocks = torch.split(delta, 32, 1)
    errors = [[rounding_error(block, bits) for block in blocks] for bits in (1, 2, 3)]
    totals = []
    for count in range(4):
        shift = [-1] * count + [0] * (6 - 2 * count) + [1] * count
        totals.append(sum(errors[1 + s][n] for n, s in enumerate(shift)))
    assert found.count(3) == totals.index(min(totals))


def rounding_error(block: torch.Tensor, bits: int) -> float:
    """Least-squares steps by scan."""
    best = torch.full((len(block),), torch.inf)
    for step in torch.linspace(0.05, 1.2, 400)[:, None] * block.square().mean(1).sqrt():
        s = step[:, None]
        level = (2 * (block / (2 * s)).floor() + 1).clamp(-(2**bits) + 1, 2**bits - 1)
        best = torch.minimum(best, (block - s * level).square().sum(1))
    return float(best.sum())


def test_one_bit_is_the_sign_times_the_mean() -> None:
    delta = torch.cat((matrix(4, 32), matrix(4, 32, seed=3)), 1)
    (term,) = encode(Slim(1, 64, "paper"), delta)
    assert isinstance(term, Coded)
    assert term.grid == "sign"
    expected = delta.sign() * delta.abs().mean(1, keepdim=True)
    torch.testing.assert_close(term.decode(), expected, rtol=2**-8, atol=0)


def test_the_papers_step_is_searched_around_the_extremes() -> None:
    delta = matrix(20, 64)
    (term,) = encode(Slim(2, 64, "paper"), delta)
    assert isinstance(term, Coded) and term.row is not None
    peak = delta.abs().amax(1, keepdim=True) / 3
    shares = (term.row.float() / peak).flatten()
    assert float(shares.min()) > 0.89 and float(shares.max()) < 1.11
    tried = [
        (delta - p * peak * (2 * (delta / (2 * p * peak)).floor() + 1).clamp(-3, 3)).abs() ** 2.4
        for p in (0.9, 1.0, 1.1)
    ]
    chosen = (delta - term.decode()).abs() ** 2.4
    assert bool((chosen.sum(1) <= torch.stack([t.sum(1) for t in tried]).min(0).values * 1.01).all())


def test_the_second_order_leaves_less_output_error_and_no_bias() -> None:
    delta, gram = matrix(24, 128), gram_of(128)
    errors = []
    for known in (gram, None):
        residual = delta - (decoded := decode(encode(Slim(2, 32), delta, known)))
        errors.append(float((residual @ gram).mul(residual).sum()))
        if known is not None:
            along, power = ((delta @ gram) * decoded).sum(1), ((delta @ gram) * delta).sum(1)
            assert along.tolist() == pytest.approx(power.tolist(), rel=2**-7)
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_bits_are_codes_and_steps(bits: int) -> None:
    delta = matrix(192, 576) * torch.linspace(0.1, 3, 576)
    terms = encode(Slim(bits), delta)
    present = 5 - widths(terms, 5).count(0)
    spent = 8 * sum(term.nbytes for term in terms) / delta.numel()
    assert spent == pytest.approx(bits + 16 * present / 576, abs=24 / delta.numel())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 0}, "bits 0 is not in 1 … 4"),
        ({"bits": 2.5}, "bits 2.5 is not in 1 … 4"),
        ({"block": 16}, "block 16 is not in 32 … 1024"),
        ({"estimator": "best"}, "estimator 'best' is not one of ('unbiased', 'paper')"),
    ],
)
def test_a_bad_configuration_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CodecError) as caught:
        Slim(**options)
    assert says in caught.value.message
