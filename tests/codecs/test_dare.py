"""DARE: numbers to check on paper, unbiasedness over seeds, the 4-bit values."""

from __future__ import annotations

import pytest
import torch

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.dare import Dare
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, SeededMask

SITE = Site(number=5, seed=7)


def test_one_survivor_of_two_is_doubled() -> None:
    """Seed 7, site 5 keeps columns 0 3 · 1 3 · 0 3 · 1 2 of the four rows (frozen in tests/kernels)."""
    delta = torch.arange(1.0, 17).reshape(4, 4)
    assert decode(Dare(group=2, value_bits=16).encode(delta, SITE)).tolist() == [
        [2, 0, 0, 8],
        [0, 12, 0, 16],
        [18, 0, 0, 24],
        [0, 28, 30, 0],
    ]


def test_a_short_last_group_is_scaled_by_its_own_size() -> None:
    decoded = decode(Dare(group=8, value_bits=16).encode(torch.ones(50, 11), SITE))
    assert decoded[:, :8].sum(1).tolist() == [8] * 50
    assert decoded[:, 8:].sum(1).tolist() == [3] * 50


def test_four_bit_values_on_paper() -> None:
    """Row 0: peak 3.5 = 7 steps of 0.5, exact. Row 1: 0.6 of 7 becomes 1, the scale (49 + 0.36) / (49 + 0.6) = 0.9952,
    in bfloat16 255/256. Row 2: zeros."""
    delta = torch.tensor([[3.5, -1.5, 0.5, 0.0], [7.0, 0.6, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    (term,) = Dare(group=1, value_bits=4).encode(delta, SITE)
    assert isinstance(term, Coded)
    assert layout.unpack(term.codes, 4, 4).tolist() == [[15, 5, 9, 8], [15, 9, 8, 8], [8, 8, 8, 8]]
    assert term.row is not None
    assert term.row.tolist() == [[0.5], [255 / 256], [0.0]]
    assert term.row.dtype == torch.bfloat16


def test_survivors_are_where_the_mask_says_and_nowhere_else() -> None:
    delta = torch.randn(9, 70, generator=torch.Generator().manual_seed(0))
    columns = SeededMask(8, SITE.seed, SITE.number).columns(9, 70)
    expected = torch.zeros(9, 70, dtype=torch.bool).scatter_(1, columns, True)
    assert torch.equal(decode(Dare(8, 16).encode(delta, SITE)) != 0, expected)


def test_the_mean_over_seeds_is_delta() -> None:
    """An entry is G·Δ with probability 1/G: its standard deviation is |Δ| √(G − 1). Powers of two: no rounding."""
    group, seeds = 8, 400
    generator = torch.Generator().manual_seed(0)
    delta = (
        2.0 ** torch.randint(-3, 4, (4, 24), generator=generator)
        * (torch.rand(4, 24, generator=generator) - 0.5).sign()
    )
    mean = sum(decode(Dare(group, 16).encode(delta, Site(5, seed))) for seed in range(seeds)) / seeds
    z = (mean - delta) / (delta.abs() * ((group - 1) / seeds) ** 0.5)
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) == pytest.approx(1, abs=0.4)


def test_the_mean_gain_over_seeds_is_one() -> None:
    delta = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    for bits in (4, 16):
        gains = [CodingError.of(delta, decode(Dare(8, bits).encode(delta, Site(5, seed)))).gain for seed in range(100)]
        spread = float(torch.tensor(gains).std()) / 10
        assert sum(gains) / 100 == pytest.approx(1, abs=4 * spread)


def test_four_bits_keep_the_whole_of_the_survivors_along_themselves() -> None:
    delta = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 3
    survivors, coded = (decode(Dare(8, bits).encode(delta, SITE)) for bits in (16, 4))
    for row in range(64):
        assert CodingError.of(survivors[row], coded[row]).gain == pytest.approx(1, abs=2**-7)


def test_the_drop_rate_is_one_minus_one_of_the_group() -> None:
    decoded = decode(Dare(group=16, value_bits=16).encode(torch.ones(8, 160), SITE))
    assert int((decoded != 0).sum()) == 8 * 160 // 16
