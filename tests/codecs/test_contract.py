"""What every codec promises, for every configuration in the list."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save
from torch import Tensor

from deltaserve.codecs.base import Codec, CodingError, Site, decode
from deltaserve.codecs.registry import CODECS, Budget, make_codec
from deltaserve.deltas.artifact import build_term, term_spec, term_tensors
from deltaserve.deltas.manifest import TermSpec
from deltaserve_kernels.terms import Coded, LowRank, Term

SITE = Site(number=5, seed=7)


@dataclass(frozen=True)
class Case:
    """A configuration. `draws`: what the seed decides; `settles`: encode gives its own output back, to this error."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    draws: bool = False
    settles: float | None = None

    @property
    def codec(self) -> Codec:
        return make_codec(self.name, self.budget, self.options)

    def __str__(self) -> str:
        said = {**{k: v for k, v in vars(self.budget).items() if v is not None}, **self.options}
        return "-".join([self.name, *map(str, said.values())])


CASES = [
    *(
        Case("bitdelta", {"scale": scale, "estimator": estimator}, settles=1e-6)
        for scale in ("tensor", "row", "col")
        for estimator in ("unbiased", "paper")
    ),
    *(
        Case("dare", {"group": group, "value_bits": bits}, draws=group > 1, settles=None if group > 1 else 1e-6)
        for group in (1, 8, 33)
        for bits in (4, 16)
    ),
    Case("dare", budget=Budget(bits=0.5), draws=True),
    Case("delta-svd", budget=Budget(rank=2), settles=0.01),
    Case("delta-svd", budget=Budget(energy=0.9)),
    Case("delta-svd", budget=Budget(bits=4)),
]
SHAPES = [(1, 1), (1, 37), (37, 1), (5, 7), (3, 130), (130, 3), (33, 65)]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def matrix(rows: int = 12, cols: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def stored(terms: list[Term]) -> dict[str, Tensor]:
    return {name: t for index, term in enumerate(terms) for name, t in term_tensors(term, f"#{index}").items()}


def same(left: list[Term], right: list[Term]) -> bool:
    a, b = stored(left), stored(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_list_covers_the_registry() -> None:
    assert {case.name for case in CASES} == set(CODECS)


@every_case
def test_same_site_and_seed_give_the_same_terms(case: Case) -> None:
    first, second = case.codec.encode(matrix(), SITE), case.codec.encode(matrix(), SITE)
    assert same(first, second)
    assert torch.equal(decode(first), decode(second))


@every_case
@pytest.mark.parametrize("other", [Site(number=5, seed=8), Site(number=6, seed=7)], ids=["seed", "site"])
def test_seed_and_site_change_what_is_drawn_and_nothing_else(case: Case, other: Site) -> None:
    first, second = decode(case.codec.encode(matrix(), SITE)), decode(case.codec.encode(matrix(), other))
    assert torch.equal(first, second) is not case.draws


@every_case
def test_the_input_is_not_modified(case: Case) -> None:
    delta = matrix()
    terms = case.codec.encode(delta, SITE)
    CodingError.of(delta, decode(terms))
    assert torch.equal(delta, matrix())


@every_case
def test_strides_do_not_matter(case: Case) -> None:
    delta = matrix()
    assert same(case.codec.encode(delta.T.contiguous().T, SITE), case.codec.encode(delta, SITE))


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_comes_back_finite(case: Case, shape: tuple[int, int]) -> None:
    terms = case.codec.encode(matrix(*shape), SITE)
    decoded = decode(terms)
    assert decoded.shape == shape
    assert decoded.dtype == torch.float32
    assert all((term.rows, term.cols) == shape for term in terms)
    assert bool(decoded.isfinite().all())
    assert bool(decoded.any())


@every_case
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (12, 40)], ids=str)
def test_a_zero_delta_is_exactly_zero(case: Case, shape: tuple[int, int]) -> None:
    terms = case.codec.encode(torch.zeros(shape), SITE)
    assert not decode(terms).any()
    assert all(bool(tensor.double().isfinite().all()) for tensor in stored(terms).values())


@every_case
def test_rows_and_columns_of_zeros_are_no_trouble(case: Case) -> None:
    delta = matrix()
    delta[3], delta[:, 4] = 0, 0
    assert bool(decode(case.codec.encode(delta, SITE)).isfinite().all())


@every_case
def test_a_delta_of_rank_one_is_no_trouble(case: Case) -> None:
    delta = matrix(12, 1) @ matrix(1, 40)
    error = CodingError.of(delta, decode(case.codec.encode(delta, SITE)))
    assert math.isfinite(error.relative)
    assert error.relative < (0.01 if case.name == "delta-svd" else 8)


@every_case
@pytest.mark.parametrize("magnitude", [1e-44, 1e-40, 1e-30, 1e-20, 1e20, 1e30], ids=str)
def test_finite_input_gives_finite_terms(case: Case, magnitude: float) -> None:
    terms = case.codec.encode(matrix() * magnitude, SITE)
    assert all(bool(tensor.double().isfinite().all()) for tensor in stored(terms).values())
    assert bool(decode(terms).isfinite().all())


@every_case
@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100], ids=str)
def test_the_code_does_not_depend_on_the_unit(case: Case, magnitude: float) -> None:
    """Powers of two only move exponents: Δ̂ scales with Δ, whatever squares do in float32."""
    scaled = decode(case.codec.encode(matrix() * magnitude, SITE)).double() / magnitude
    torch.testing.assert_close(scaled, decode(case.codec.encode(matrix(), SITE)).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.settles is not None], ids=str)
def test_encoding_its_own_output_gives_it_back(case: Case) -> None:
    once = decode(case.codec.encode(matrix(), SITE))
    twice = decode(case.codec.encode(once, SITE))
    assert case.settles is not None
    assert CodingError.of(once, twice).relative <= case.settles


@every_case
def test_terms_survive_the_file_format(case: Case) -> None:
    for shape in [(5, 7), (12, 40)]:
        terms = case.codec.encode(matrix(*shape), SITE)
        tensors = load(save(stored(terms)))
        specs = [TypeAdapter(TermSpec).dump_json(term_spec(term)) for term in terms]
        restored = [
            build_term(
                TypeAdapter(TermSpec).validate_json(spec), f"#{index}", tensors.__getitem__, SITE.seed, SITE.number
            )
            for index, spec in enumerate(specs)
        ]
        assert same(restored, terms)
        assert torch.equal(decode(restored), decode(terms))
        assert sum(term.nbytes for term in restored) == sum(term.nbytes for term in terms)


@every_case
def test_a_seeded_mask_is_not_stored(case: Case) -> None:
    for term in case.codec.encode(matrix(), SITE):
        parts = [term] if isinstance(term, Coded) else [term.left, term.right]
        assert all(part.columns is None for part in parts)


def bits_by_formula(case: Case, terms: list[Term], rows: int, cols: int) -> float:
    """Bits per parameter as the codecs' docstrings have them."""
    if case.name == "bitdelta":
        extra = {"tensor": 32 / (rows * cols), "row": 16 / cols, "col": 16 / rows}
        return 1 + extra[case.options["scale"]]
    if case.name == "dare":
        group, bits = case.codec.config()["group"], case.codec.config()["value_bits"]
        return bits / group + (16 / cols if bits == 4 else 0)
    (term,) = terms
    assert isinstance(term, LowRank)
    rank = len(term.s)
    return 16 * rank * (rows + cols) / (rows * cols) + 32 * rank / (rows * cols)


@every_case
def test_stored_bytes_are_what_the_formula_says(case: Case) -> None:
    rows, cols = 16, 8 * 33 * 2  # whole bytes and whole groups
    terms = case.codec.encode(matrix(rows, cols), SITE)
    num_bytes = sum(tensor.nbytes for tensor in stored(terms).values())
    assert num_bytes == sum(term.nbytes for term in terms)
    assert num_bytes * 8 == pytest.approx(bits_by_formula(case, terms, rows, cols) * rows * cols)


@every_case
def test_the_configuration_rebuilds_the_codec(case: Case) -> None:
    codec = case.codec
    assert codec.name == case.name
    assert make_codec(codec.name, None, codec.config()) == codec
