"""DARE: numbers to check on paper, unbiasedness over seeds, the coded values, the budget, DAREx-q's rescale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.dare import Dare
from deltaserve.errors import CodecError
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


def test_signs_alone_on_paper() -> None:
    """Every column survives. Row 0: Σv² = 12, Σ|v| = 6, scale 2; row 1: 4 / 4. Over the tensor 16 / 10 = 1.6."""
    delta = torch.tensor([[3.0, -1, 1, -1], [1, 1, -1, -1]])
    (by_row,) = Dare(1, 1).encode(delta, SITE)
    assert isinstance(by_row, Coded)
    assert (by_row.grid, by_row.codes.tolist()) == ("sign", [[0b0101], [0b0011]])
    assert torch.equal(by_row.decode(), delta.sign() * torch.tensor([[2.0], [1.0]]))
    (whole,) = Dare(1, 1, scale="tensor").encode(delta, SITE)
    assert isinstance(whole, Coded) and whole.row is not None
    assert (whole.row.dtype, whole.row.shape) == (torch.float32, ())
    torch.testing.assert_close(whole.decode(), delta.sign() * 1.6)


def test_two_bit_values_on_paper() -> None:
    """±1 and ±3 half-steps are met exactly."""
    delta = torch.tensor([[0.5, -1.5, 1.5, -0.5], [0, 0, 0, 0]])
    (term,) = Dare(1, 2).encode(delta, SITE)
    assert isinstance(term, Coded)
    assert layout.unpack(term.codes, 2, 4)[0].tolist() == [2, 0, 3, 1]
    assert torch.equal(term.decode(), delta)


def test_zeros_add_no_common_direction() -> None:
    delta = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    delta[:, ::2] = 0
    decoded = decode(Dare(1, 1).encode(delta, SITE))[:, ::2]
    assert abs(float(decoded.sign().mean())) < 4 / decoded.numel() ** 0.5


@pytest.mark.parametrize(("value_bits", "scale"), [(1, "row"), (1, "tensor"), (2, "tensor"), (4, "tensor")])
def test_the_mean_gain_of_coded_values_over_seeds_is_one(value_bits: int, scale: str) -> None:
    delta = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    codec = Dare(8, value_bits, scale=scale)  # type: ignore[arg-type]
    gains = [CodingError.of(delta, decode(codec.encode(delta, Site(5, seed)))).gain for seed in range(60)]
    assert sum(gains) / 60 == pytest.approx(1, abs=4 * float(torch.tensor(gains).std()) / 60**0.5)


@pytest.mark.parametrize("shape", [(192, 576), (576, 1536), (256, 4096)], ids=str)
@pytest.mark.parametrize(("bits", "value_bits", "scale"), [(0.05, 4, "row"), (0.03, 1, "tensor"), (1.5, 16, "row")])
def test_bits_are_a_ceiling_with_the_scales_counted(
    shape: tuple[int, int], bits: float, value_bits: int, scale: str
) -> None:
    (term,) = Dare(bits=bits, value_bits=value_bits, scale=scale).encode(torch.zeros(shape), SITE)  # type: ignore[arg-type]
    spent = 8 * term.nbytes / (shape[0] * shape[1])
    assert 0.6 * bits < spent <= bits


def test_darex_q_is_the_rescale_of_the_least_output_change() -> None:
    generator = torch.Generator().manual_seed(0)
    delta, inputs = torch.randn(8, 64, generator=generator), torch.randn(300, 64, generator=generator) + 1
    gram = inputs.T @ inputs / 300

    def change(gain: float) -> float:
        return float(((delta - gain * plain) @ gram).mul(delta - gain * plain).sum())

    plain = decode(Dare(8, 16).encode(delta, SITE)).double()
    delta, gram = delta.double(), gram.double()
    fitted = decode(Dare(8, 16, rescale="darex-q").encode(delta.float(), Site(5, 7, gram.float()))).double()
    gain = float((fitted * plain).sum() / plain.square().sum())
    assert 1 / 8 < gain < 1
    assert change(gain) <= min(change(gain * 0.98), change(gain * 1.02))


def test_darex_q_never_rescales_beyond_the_drop_or_below_one() -> None:
    """Without a gram matrix least squares are no rescale at all, q = 1; with Δ = 1 and inputs of ones, q = 1 − p."""
    delta = torch.ones(4, 16)
    assert decode(Dare(8, 16, rescale="darex-q").encode(delta, SITE)).max() == 1
    assert decode(Dare(8, 16, rescale="darex-q").encode(delta, Site(5, 7, torch.ones(16, 16)))).max() == 8


def test_only_darex_q_asks_for_a_gram_matrix() -> None:
    assert Dare(8, rescale="darex-q").needs_gram
    assert not Dare(8).needs_gram


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "exactly one of group, bits"),
        ({"group": 8, "bits": 0.5}, "exactly one of group, bits"),
        ({"bits": 0.0}, "bits 0 is not in 0 … 4"),
        ({"bits": 1.5, "value_bits": 1}, "bits 1.5 is not in 0 … 1"),
        ({"group": 8, "value_bits": 3}, "value_bits 3 is not 1, 2, 4 or 16"),
        ({"group": 8, "scale": "col"}, "scale 'col' is not one of ('row', 'tensor')"),
        ({"group": 8, "rescale": "best"}, "rescale 'best' is not one of ('unbiased', 'darex-q')"),
    ],
)
def test_a_bad_configuration_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CodecError) as caught:
        Dare(**options)
    assert says in caught.value.message
