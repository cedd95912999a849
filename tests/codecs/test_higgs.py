"""higgs: the turned rows, the nearest vectors, both scales, and the grid that a budget buys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.higgs import GRIDS, Higgs
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Book, Codebook, Rotated

SITE = Site(number=5, seed=7)


def matrix(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def coded(codec: Higgs, delta: Tensor) -> tuple[Codebook, Rotated]:
    (term,) = codec.encode(delta, SITE)
    assert isinstance(term, Rotated) and isinstance(term.term, Codebook) and term.t_out is None
    return term.term, term


def indices(inner: Codebook) -> Tensor:
    """int64 [rows, segments]"""
    return inner.indices()[0][0]


def test_four_by_four_on_paper() -> None:
    """One bit an entry: each row is turned into four numbers of one size, whose signs and scale are all of it."""
    delta = torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 0], [2, 2, 2, -2], [-3, 3, 3, 3]])
    inner, term = coded(Higgs(bits=5, block=4), delta)  # 1 bit, and 16 for the scale of a row of 4
    assert (inner.bits, inner.length, inner.index_bits) == (1, 1, 1)
    turned = torch.tensor([[2.0, 2, 2, 2], [2, -2, 2, -2], [2, 2, 2, -2], [3, -3, -3, -3]])
    assert torch.equal(inner.table()[indices(inner), 0, 0].sign(), turned.sign())
    torch.testing.assert_close(term.decode(), delta, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("bits, length", [(4.1, 2), (1.1, 8), (0.55, 16), (2.1, 1)])
def test_every_segment_gets_the_nearest_vector(bits: float, length: int) -> None:
    """By brute force; a shorter last segment in the entries that it has."""
    delta = matrix(5, 128 + length // 2)
    inner, term = coded(Higgs(bits=bits + 0.15, length=length), delta)
    assert inner.length == length and term.t_in is not None
    turned = term.t_in.forward(delta.double())
    unit = turned / turned.square().mean(1, keepdim=True).sqrt()
    table = inner.table()[:, 0].double()
    for i in range(5):
        for s in range(inner.segments):
            segment = unit[i, s * length : (s + 1) * length]
            errors = (segment - table[:, : len(segment)]).square().sum(1)
            assert float(errors[indices(inner)[i, s]]) == pytest.approx(float(errors.min()), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("scale", ["row", "tensor"])
def test_the_unbiased_scale_leaves_no_shrinkage_and_the_papers_is_the_rms(scale: Any) -> None:
    delta = matrix(64, 256) * torch.logspace(-2, 2, 64)[:, None]
    axis = 1 if scale == "row" else (0, 1)
    unbiased = decode(Higgs(bits=1.2, scale=scale).encode(delta, SITE))
    gains = (delta * unbiased).sum(axis) / delta.square().sum(axis)
    torch.testing.assert_close(gains, torch.ones_like(gains), rtol=2**-8, atol=0)  # of bfloat16
    inner, _ = coded(Higgs(bits=1.2, scale=scale, estimator="paper"), delta)
    rms = delta.square().mean(axis, keepdim=True).sqrt()
    torch.testing.assert_close(inner.row.float().flatten(), rms.flatten(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits, distortion", [(0.55, 0.58), (1.05, 0.32), (2.05, 0.098), (4.05, 0.0081)])
def test_the_error_is_that_of_the_grid_whatever_the_entries_are(bits: float, distortion: float) -> None:
    """The paper's scale: ‖Δ − Δ̂‖² = D ‖Δ‖², of a normal Δ and of one with few large entries."""
    sparse = torch.where(torch.rand(48, 1024, generator=torch.Generator().manual_seed(3)) < 0.05, 1.0, 0.0)
    for delta in (matrix(48, 1024), sparse * matrix(48, 1024, seed=2)):
        error = CodingError.of(delta, decode(Higgs(bits=bits, estimator="paper").encode(delta, SITE)))
        assert error.relative**2 == pytest.approx(distortion, rel=0.06)
        assert error.gain == pytest.approx(1 - distortion, rel=0.06)


def test_without_a_turn_large_entries_cost_more() -> None:
    delta = matrix(48, 1024)
    delta[:, ::64] *= 30
    turned, plain = (
        CodingError.of(delta, decode(Higgs(bits=2.05, block=block).encode(delta, SITE))).relative for block in (1024, 1)
    )
    assert turned < 0.6 * plain


@pytest.mark.parametrize("bits", [0.29, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5])
@pytest.mark.parametrize("shape", [(192, 576), (48, 1536)])
def test_bits_are_a_ceiling_and_nearly_reached(bits: float, shape: tuple[int, int]) -> None:
    inner, term = coded(make_codec("higgs", Budget(bits=bits)), torch.zeros(shape))  # type: ignore[arg-type]
    spent = 8 * term.nbytes / math.prod(shape)
    assert 0.8 * min(bits, 4.1) < spent <= bits
    assert (inner.length, inner.index_bits) in GRIDS


def test_every_grid_is_shipped_and_rates_rise() -> None:
    assert all(Book("gaussian").exists(bits, length) for length, bits in GRIDS)
    rates = [bits / length for length, bits in GRIDS]
    assert rates == sorted(rates)


@pytest.mark.parametrize(
    "options",
    [{"bits": 0.2}, {"bits": 33}, {"bits": math.nan}, {"length": 11}, {"length": 2.5}, {"scale": "col"}]
    + [{"estimator": "best"}, {"block": 0}, {"block": 12}, {"block": 8192}, {"block": 2.0}, {"bits": 1.0, "length": 2}],
)
def test_a_setting_out_of_range_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(CodecError, match=f"higgs: {next(iter(options))}"):
        Higgs(**options)


def test_a_budget_of_another_kind_is_refused() -> None:
    with pytest.raises(CodecError, match="--rank"):
        make_codec("higgs", Budget(rank=4))
