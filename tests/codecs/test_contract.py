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
from deltaserve.codecs.budget import Budget
from deltaserve.codecs.registry import CODECS, make_codec
from deltaserve.deltas.specs import TermSpec, build_term, term_spec, term_tensors
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Codebook, Coded, Exact, LowRank, Patches, Placed, Rotated, Term

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
    *(
        Case("dare", {"group": group, "value_bits": bits, "scale": scale}, draws=group > 1)
        for group, bits, scale in ((1, 1, "row"), (8, 1, "tensor"), (8, 2, "row"), (8, 2, "tensor"), (8, 4, "tensor"))
    ),
    Case("dare", {"group": 8, "rescale": "darex-q"}, draws=True),
    Case("dare", {"value_bits": 1, "scale": "tensor"}, Budget(bits=0.1), draws=True),
    *(Case("ultradelta", {"estimator": e}, Budget(bits=0.25), draws=True) for e in ("unbiased", "paper")),
    Case("ultradelta", {"gamma": 0.5}, Budget(bits=2), draws=True),
    *(Case("deltadq", {"estimator": e}, Budget(bits=0.5), draws=True) for e in ("unbiased", "paper")),
    Case("deltadq", {"value_bits": 1}, Budget(bits=0.25), draws=True),
    Case("deltadq", {"value_bits": 3}, Budget(bits=2), draws=True),
    *(Case("deltazip", {"value_bits": b, "estimator": e}) for b in (2, 4) for e in ("unbiased", "paper")),
    *(Case("slim", {"bits": b, "block": 32, "estimator": e}) for b in (1, 2, 4) for e in ("unbiased", "paper")),
    Case("slim", {"bits": 2}),
    *(Case("seeded-vq", {"bits": bits, "code_bits": 5}) for bits in (0.03, 0.06, 0.5, 2.0)),
    Case("auto", {"bits": 0.03}),
    Case("auto"),
    *(Case("higgs", {"bits": bits, "estimator": e}) for bits in (0.5, 1.1, 4.0) for e in ("unbiased", "paper")),
    Case("higgs", {"bits": 2.2, "scale": "tensor", "block": 64}),
    Case("higgs", {"bits": 2.2, "length": 4, "block": 1}),
    Case("delta-come", budget=Budget(bits=0.5)),
    *(
        Case("delta-come", {"estimator": e, "scale": "peak", "step_group": 32}, Budget(bits=3))
        for e in ("unbiased", "paper")
    ),
    *(
        Case("deltamix", {"mixed": mixed, "corrected": corrected}, Budget(bits=1))
        for mixed in (True, False)
        for corrected in (True, False)
    ),
    Case("deltamix", {"u_bits": "same", "errors": "right", "estimator": "paper"}, Budget(bits=0.25)),
    Case("deltamix", {"u_bits": 4, "max_widths": 1}, Budget(bits=8)),
    Case("lossless", settles=0.0),
    Case("delta-svd", budget=Budget(rank=2), settles=0.01),
    Case("delta-svd", budget=Budget(energy=0.9)),
    Case("delta-svd", budget=Budget(bits=4)),
    *(
        Case("delta-dct", {"patch": 8, "split": split, "estimator": estimator}, Budget(bits=1))
        for split, estimator in (("even", "unbiased"), ("even", "paper"), ("2-0", "paper"), ("2-1-0", "unbiased"))
    ),
    Case("delta-dct", {"rescale": False}, Budget(bits=0.3)),
    *(Case("dqrelo", {"estimator": e}, Budget(bits=8)) for e in ("unbiased", "paper")),
    Case("dqrelo", {"factor_bits": 3}, Budget(bits=3)),
    Case("impart", budget=Budget(bits=0.5), draws=True),
    Case("impart", {"exponent": 2.0, "estimator": "paper"}, Budget(bits=4), draws=True),
    *(
        Case("impart", {"quantised": False, "exponent": 2.0, "estimator": e}, Budget(bits=10), draws=True)
        for e in ("unbiased", "paper")
    ),
    *(Case("loraquant", {"estimator": e}, Budget(bits=2)) for e in ("unbiased", "paper")),
    Case("loraquant", {"coverage": 0.5, "high_bits": 3}, Budget(bits=1)),
    Case("lora-svd", budget=Budget(rank=2), settles=0.01),
    Case("lora-svd", budget=Budget(bits=4)),
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
    assert error.relative < (0.01 if case.name in ("delta-svd", "lora-svd") else 100)


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
def test_what_is_made_at_load_is_not_stored(case: Case) -> None:
    for term in case.codec.encode(matrix(), SITE):
        assert term.tensors().keys() == term.tensors(derived=True).keys()


def bits_by_formula(case: Case, terms: list[Term], rows: int, cols: int) -> float:
    """Bits per parameter as the codecs' docstrings have them."""
    config, entries = case.codec.config(), rows * cols
    (first, *_) = terms
    match first:
        case Codebook():
            blocks = -(-rows // first.tile) * -(-cols // first.length)
            levels = 4 * rows if first.levels is not None else 0
            codes = 8 * layout.packed_bytes(first.stages * blocks, first.bits)
            scale = 32 if first.row.dim() == 0 else 16 * rows
            return (codes + scale + (32 * first.stages if first.stages > 1 else 0) + levels) / entries
        case Rotated():
            return sum(bits_by_formula(case, [term.term], rows, cols) for term in terms if isinstance(term, Rotated))
        case Patches():
            bitmap = 8 * layout.packed_bytes(math.prod(first.grid_shape), 1)
            return (len(first.scale) * (first.bits * first.size**2 + 16) + bitmap) / entries
        case Exact():
            return 8 * len(first.stream) / entries
        case LowRank():
            return sum(rank_bits(term, config.get("step_group")) for term in terms) / entries
    if case.name == "bitdelta":
        return 1 + {"tensor": 32 / entries, "row": 16 / cols, "col": 16 / rows}[config["scale"]]
    if case.name == "dqrelo":
        return 1 + (32 + rank_bits(terms[1])) / entries
    if case.name == "slim":
        blocks = -(-cols // config["block"])
        present = 8 * -(-blocks // 8) * len(terms) / entries if isinstance(first, Placed) else 0
        return config["bits"] + 16 * blocks / cols + present
    assert isinstance(first, Coded)
    if case.name == "deltazip":
        return config["value_bits"] / 2 + 1 + 16 / cols
    codes = (
        8 * layout.packed_bytes(first.num_codes, first.bits) / cols if first.bits < 16 else 16 * first.num_codes / cols
    )
    scales = {"dare": 0 if first.bits == 16 else 16 / cols if config.get("scale") == "row" else 32 / entries}
    return codes + {**scales, "ultradelta": 512 / entries, "deltadq": 32 / entries}[case.name]


def rank_bits(term: Term, group: int | None = None) -> int:
    """Of ranks that share their widths, with steps for each `group` entries or none."""
    assert isinstance(term, LowRank)
    rows, ranks, cols = term.rows, len(term.s), term.cols
    left, right = (8 * layout.packed_bytes(factor.num_codes, factor.bits) for factor in (term.left, term.right))
    steps = 16 * (rows * -(-ranks // group) + ranks * -(-cols // group)) if group else 0
    return rows * left + ranks * (right + 32) + steps


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
