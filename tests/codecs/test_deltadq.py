"""DeltaDQ: a budget's survivors, group by group; the group size with the least output error; values on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deltaserve.codecs.base import CodingError, Site, decode
from deltaserve.codecs.deltadq import DeltaDQ
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, SeededMask

SITE = Site(number=5, seed=7)


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def encode(codec: DeltaDQ, delta: torch.Tensor, site: Site = SITE) -> Coded:
    (term,) = codec.encode(delta, site)
    assert isinstance(term, Coded)
    return term


def test_values_on_paper() -> None:
    """Four columns, two bits, all four survive: the extremes are 3 levels of 0.5, every entry is met."""
    delta = torch.tensor([[1.5, -0.5, 0.5, -1.5]])
    for estimator in ("unbiased", "paper"):
        term = encode(DeltaDQ(bits=2.0, value_bits=2, estimator=estimator), delta)  # type: ignore[arg-type]
        assert layout.unpack(term.codes, 2, 4).tolist() == [[3, 1, 2, 0]]
        assert torch.equal(term.decode(), delta)


def test_the_papers_step_is_that_of_the_extremes() -> None:
    delta = matrix(16, 64)
    (paper, ours) = (
        encode(DeltaDQ(bits=2, estimator=estimator), delta)
        for estimator in ("paper", "unbiased")  # type: ignore[arg-type]
    )
    assert paper.mask is not None
    assert paper.row is not None and (paper.row.dtype, paper.row.shape) == (torch.float32, ())
    assert paper.mask == ours.mask
    columns = paper.mask.columns(16, 64)
    survivors = torch.zeros_like(delta).scatter_(1, columns, delta.gather(1, columns) * paper.mask.inverse_rate(64))
    assert float(paper.row) == pytest.approx(float(survivors.abs().max()) / 15)
    assert CodingError.of(survivors, decode([ours])).gain == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value_bits", [1, 3, 4])
def test_every_group_of_every_row_keeps_the_same_number(value_bits: int) -> None:
    term = encode(DeltaDQ(bits=value_bits / 8, value_bits=value_bits), matrix(20, 512))
    assert isinstance(term.mask, SeededMask)
    kept = (term.decode() != 0).view(20, -1)[:, : 512 // term.mask.group * term.mask.group]
    assert bool((kept.unflatten(1, (-1, term.mask.group)).sum(-1) == term.mask.keep).all())


def test_the_group_has_the_least_output_error_of_the_ladder() -> None:
    """All inputs alike and a drop of 7/8: brute force over one of 8, two of 16, …, all of a row's in one group."""
    delta, rows, cols = matrix(6, 256), 6, 256
    inputs = matrix(400, cols, seed=1) + 2
    gram = inputs.T @ inputs / 400
    term = encode(DeltaDQ(bits=4 / 8 + 32 / (rows * cols)), delta, Site(5, 7, gram))
    errors = {}
    for keep in (1, 2, 4, 8, 16, 32):
        mask = SeededMask(8 * keep, 7, 5, keep=keep)
        kept = delta.gather(1, mask.columns(rows, cols)) * 8
        error = delta - torch.zeros_like(delta).scatter_(1, mask.columns(rows, cols), kept)
        errors[keep] = float((inputs @ error.T).square().mean())
    assert isinstance(term.mask, SeededMask)
    assert (term.mask.group, term.mask.keep) == (
        8 * min(errors, key=errors.__getitem__),
        min(errors, key=errors.__getitem__),
    )


def test_without_a_gram_matrix_row_sums_decide() -> None:
    delta = matrix(16, 256)
    assert encode(DeltaDQ(), delta).mask == encode(DeltaDQ(), delta, Site(5, 7, torch.ones(256, 256))).mask


def test_the_mean_gain_over_seeds_is_one() -> None:
    delta = matrix(32, 128)
    gains = [CodingError.of(delta, encode(DeltaDQ(), delta, Site(5, seed)).decode()).gain for seed in range(80)]
    assert sum(gains) / 80 == pytest.approx(1, abs=4 * float(torch.tensor(gains).std()) / 80**0.5)


@pytest.mark.parametrize("shape", [(192, 576), (576, 1536)], ids=str)
@pytest.mark.parametrize(("bits", "value_bits"), [(0.05, 4), (0.03, 1), (0.5, 3), (3.5, 4)])
def test_bits_are_a_ceiling_with_the_scale_counted(shape: tuple[int, int], bits: float, value_bits: int) -> None:
    spent = 8 * encode(DeltaDQ(bits=bits, value_bits=value_bits), torch.zeros(shape)).nbytes / math.prod(shape)
    assert 0.5 * bits < spent <= bits


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 0.0}, "bits 0 is not in 0 … 4"),
        ({"bits": 2.0, "value_bits": 1}, "bits 2 is not in 0 … 1"),
        ({"value_bits": 6}, "value_bits 6 is not in 1 … 5"),
        ({"value_bits": 2.5}, "value_bits 2.5 is not in 1 … 5"),
        ({"estimator": "best"}, "estimator 'best' is not one of ('unbiased', 'paper')"),
    ],
)
def test_a_bad_configuration_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CodecError) as caught:
        DeltaDQ(**options)
    assert says in caught.value.message
