"""ImPart: keep rates on paper, the paper's mean drop ratio, and directions that masks leave unbiased."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import CodingError, Estimator, Site, decode
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.impart import RATES, ImPart, Span
from deltaserve.codecs.registry import make_codec
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import LowRank, SeededMask

SITE = Site(number=5, seed=7)


def encode(codec: ImPart, delta: Tensor, site: Site = SITE) -> list[LowRank]:
    terms = codec.encode(delta, site)
    assert all(isinstance(term, LowRank) for term in terms)
    return [term for term in terms if isinstance(term, LowRank)]


def matrix(rows: int = 64, cols: int = 96) -> Tensor:
    """Singular values that fall like 1/√k."""
    generator = torch.Generator().manual_seed(rows)
    u, _, vt = torch.linalg.svd(torch.randn(rows, cols, generator=generator), full_matrices=False)
    decayed: Tensor = (u / torch.arange(1, min(rows, cols) + 1).sqrt()) @ vt
    return decayed


def test_keep_rates_on_paper() -> None:
    """σ^½/σ₁^½ = 1, ½, ¼, ¼ and γ = ½: 1 − p = 1, ¾, ⅝, ⅝. Their mean is ¾; without the last 2.375/4; one more would be
    under ½."""
    spans = ImPart(quantised=False, tail=0)._spans(torch.tensor([16.0, 4, 1, 1]).double(), 4, 4, 0.5)
    assert spans == [Span(0, 1, Fraction(1), 16), Span(1, 2, Fraction(3, 4), 16), Span(2, 3, Fraction(5, 8), 16)]


def test_nothing_is_dropped_where_all_fits() -> None:
    terms = encode(ImPart(bits=100, tail=0, quantised=False), matrix())
    assert [(len(term.s), term.left.mask, term.right.mask) for term in terms] == [(64, None, None)]
    assert CodingError.of(matrix(), decode(terms)).relative < 0.01


@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
def test_the_mean_drop_ratio_is_gamma(gamma: float) -> None:
    """To the rounding to RATES, and to the last direction."""
    sigma = torch.linalg.svdvals(matrix().double())
    spans = ImPart(tail=0)._spans(sigma, 64, 96, gamma)
    kept = sum(float(span.keep) * (span.stop - span.start) for span in spans) / 64
    assert kept == pytest.approx(1 - gamma, abs=0.06)
    assert [span.keep for span in spans] == sorted((span.keep for span in spans), reverse=True)
    assert {span.keep for span in spans} <= set(RATES)
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]


def test_the_quantised_form_has_the_papers_widths() -> None:
    terms = encode(ImPart(bits=100, tail=0), matrix())
    assert [(term.left.bits, term.right.bits, len(term.s)) for term in terms] == [(8, 8, 2), (3, 3, 32), (2, 2, 30)]
    (term,) = encode(ImPart(bits=100, tail=0, quantised=False), matrix())
    assert term.left.codes.dtype == torch.bfloat16


def test_the_tail_is_cut_off() -> None:
    assert sum(len(term.s) for term in encode(ImPart(bits=100, tail=0.75), matrix())) == 16


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("bits", [0.6, 1.2, 2.0])
def test_bits_are_met_from_below(bits: float, quantised: bool) -> None:
    delta = matrix(192, 192)
    terms = encode(ImPart(bits=bits, quantised=quantised), delta)
    assert (0.9 if quantised else 0.7) * bits < 8 * sum(term.nbytes for term in terms) / delta.numel() <= bits


def test_a_masked_direction_is_unbiased_along_itself() -> None:
    """And by the paper's 1/(1 − p) each, to the luck of the draw."""
    delta = matrix()
    u, sigma, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    cases: list[tuple[Estimator, float]] = [("unbiased", 0.01), ("paper", 1.0)]
    for estimator, tolerance in cases:
        terms = encode(ImPart(bits=2, quantised=False, estimator=estimator), delta)
        assert any(term.left.mask for term in terms)
        start, gains = 0, []
        for term in terms:
            span = slice(start, start + len(term.s))
            left = (u[:, span] * term.left.decode()).sum(0)
            right = (vt[span] * term.right.decode()).sum(1)
            gains.append(left * right * term.s / sigma[span])
            start = span.stop
        along = torch.cat(gains)
        assert float((along - 1).abs().max()) < tolerance
        assert float(along.mean()) == pytest.approx(1, abs=0.2)


def test_every_mask_has_a_stream_of_its_own() -> None:
    terms = encode(ImPart(bits=0.7), matrix(192, 192))
    masks = [mask for term in terms for mask in (term.left.mask, term.right.mask) if isinstance(mask, SeededMask)]
    assert len(masks) > 4
    assert len({mask.stream for mask in masks}) == len(masks)


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        (Budget(bits=0.01), {}, ["--bits 0.01", "0.01548", "192 × 576"]),
        (Budget(), {"bits": 0.0}, ["bits 0.0", "> 0"]),
        (Budget(), {"quantised": 1}, ["quantised 1", "true or false"]),
        (Budget(), {"tail": 1.0}, ["tail 1.0", "0 … 1"]),
        (Budget(), {"exponent": 0.0}, ["exponent 0.0", "> 0"]),
        (Budget(), {"estimator": "best"}, ["estimator 'best'", "unbiased", "paper"]),
        (Budget(energy=0.5), {}, ["--energy"]),
    ],
)
def test_what_is_refused(budget: Budget, options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(CodecError) as caught:
        make_codec("impart", budget, options)
    assert all(part in caught.value.message for part in says)
