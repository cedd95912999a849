"""DeltaZip: two of four on paper, the sweep against OBS written out, what the second order buys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaserve.codecs.base import Site
from deltaserve.codecs.deltazip import DAMP, DeltaZip
from deltaserve.codecs.uniform import fitted_step, odd_levels
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, ExplicitMask


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def gram_of(cols: int) -> torch.Tensor:
    inputs = matrix(4 * cols, cols, seed=1) @ matrix(cols, cols, seed=2) + 0.5
    return inputs.T @ inputs / len(inputs)


def encode(codec: DeltaZip, delta: torch.Tensor, gram: torch.Tensor | None = None) -> Coded:
    (term,) = codec.encode(delta, Site(5, 7, gram))
    assert isinstance(term, Coded)
    return term


def output_error(delta: torch.Tensor, decoded: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((delta - decoded) @ gram).mul(delta - decoded).sum())


def test_the_two_largest_of_four_on_paper() -> None:
    """±1 and ±3 halves survive exactly; their places are 1 3 and 0 2, two bits each."""
    delta = torch.tensor([[0.1, -1.5, 0.2, 0.5, 1.5, 0.1, -0.5, 0.3]])
    term = encode(DeltaZip(estimator="paper"), delta)
    assert isinstance(term.mask, ExplicitMask)
    assert layout.unpack(term.mask.places, 2, 4).tolist() == [[1, 3, 0, 2]]
    assert layout.unpack(term.codes, 2, 4).tolist() == [[0, 2, 3, 1]]
    assert term.decode().tolist() == [[0, -1.5, 0, 0.5, 1.5, 0, -0.5, 0]]


def test_unbiased_makes_up_for_what_was_dropped() -> None:
    delta = matrix(8, 64)
    ours, paper = (encode(DeltaZip(4, estimator), delta).decode() for estimator in ("unbiased", "paper"))  # type: ignore[arg-type]
    assert (ours * delta).sum(1).tolist() == pytest.approx(delta.square().sum(1).tolist(), rel=2**-8)
    assert ((paper * delta).sum(1) < delta.square().sum(1)).all()


@pytest.mark.parametrize("value_bits", [2, 4])
def test_the_sweep_is_optimal_brain_surgery_written_out(value_bits: int) -> None:
    """Column by column with the inverse of what is left of H: the same mask and the same levels."""
    delta, gram = matrix(5, 12), gram_of(12)
    term = encode(DeltaZip(value_bits, "paper"), delta, gram)
    damped = gram.double() + DAMP * gram.double().diagonal().mean() * torch.eye(12, dtype=torch.float64)
    largest = delta.view(5, 3, 4).abs().topk(2).indices
    step = fitted_step(delta.view(5, 3, 4).gather(2, largest).flatten(1), value_bits).bfloat16().double()
    rest, expected = delta.double(), torch.zeros(5, 12, dtype=torch.float64)
    for start in range(0, 12, 4):
        spread = torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0].sqrt() for j in range(start, start + 4)])
        keep = (rest[:, start : start + 4] / spread).abs().topk(2).indices
        survives = torch.zeros(5, 4).scatter_(1, keep, 1)
        for j in range(start, start + 4):
            inverse = torch.linalg.inv(damped[j:, j:])
            expected[:, j] = (
                odd_levels(rest[:, j : j + 1], step, value_bits)[:, 0] * step[:, 0] * survives[:, j - start]
            )
            rest[:, j:] -= (rest[:, j] - expected[:, j])[:, None] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(term.decode().double(), expected, rtol=1e-5, atol=1e-6)


def test_the_second_order_leaves_less_output_error() -> None:
    delta, gram = matrix(16, 64), gram_of(64)
    with_gram, without = encode(DeltaZip(4), delta, gram).decode(), encode(DeltaZip(4), delta).decode()
    assert output_error(delta, with_gram, gram) < 0.7 * output_error(delta, without, gram)
    along = ((delta @ gram) * with_gram).sum(1)
    assert along.tolist() == pytest.approx(((delta @ gram) * delta).sum(1).tolist(), rel=2**-7)


def test_a_short_last_group_keeps_what_it_has_up_to_two() -> None:
    for cols, kept in ((5, 3), (6, 4), (7, 4)):
        assert (encode(DeltaZip(), matrix(9, cols)).decode() != 0).sum(1).tolist() == [kept] * 9


@pytest.mark.parametrize(("value_bits", "bits"), [(2, 2.0), (4, 3.0)])
def test_bits_are_codes_places_and_scales(value_bits: int, bits: float) -> None:
    assert 8 * encode(DeltaZip(value_bits), matrix(24, 576)).nbytes / (24 * 576) == pytest.approx(bits + 16 / 576)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"value_bits": 3}, "value_bits 3 is not 2 or 4"),
        ({"estimator": "best"}, "estimator 'best' is not one of ('unbiased', 'paper')"),
    ],
)
def test_a_bad_configuration_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CodecError) as caught:
        DeltaZip(**options)
    assert says in caught.value.message
