"""DeltaMix: the correction written out, each ingredient by itself, and what the program may use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import Site, decode
from deltaserve.codecs.delta_come import DeltaCome
from deltaserve.codecs.deltamix import WIDTHS, DeltaMix
from deltaserve.codecs.rank_factors import quantise_rows
from deltaserve.codecs.rank_moments import Moments, corrected
from deltaserve.codecs.rank_widths import group_bytes
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import LowRank

ROWS, COLS = 96, 128


def fine_tune(rows: int = ROWS, cols: int = COLS) -> Tensor:
    """Singular values that fall like a fine-tune's."""
    generator = torch.Generator().manual_seed(0)
    count = min(rows, cols)
    left, right = (torch.randn(n, count, generator=generator) for n in (rows, cols))
    return (left * torch.linspace(0, -4, count).exp()) @ right.T / 100


def gram_of(cols: int = COLS) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return inputs.T @ inputs / len(inputs)


def encode(codec: DeltaMix | DeltaCome, delta: Tensor, gram: Tensor | None = None) -> list[LowRank]:
    terms = codec.encode(delta, Site(5, 7, gram))
    assert all(isinstance(term, LowRank) for term in terms)
    return terms  # type: ignore[return-value]


def bytes_of(terms: list[LowRank]) -> int:
    return sum(term.nbytes for term in terms)


def output_error(codec: DeltaMix | DeltaCome, gram: Tensor | None = None) -> float:
    delta, gram = fine_tune(), gram_of() if gram is None else gram
    missed = delta - decode(encode(codec, delta, gram))
    return float(((missed @ gram) * missed).sum() / ((delta @ gram) * delta).sum())


def test_signs_of_one_rank_on_paper() -> None:
    """One magnitude in u and in v, so that every width is exact."""
    delta = torch.tensor([[1.0, -1, 1, 1]]).T @ torch.tensor([[1.0, 1, -1, 1]])
    torch.testing.assert_close(decode(encode(DeltaMix(1.0), delta)), delta)


def test_without_either_ingredient_it_is_delta_come() -> None:
    ours = encode(DeltaMix(1.0, mixed=False, corrected=False), fine_tune(), gram_of())
    theirs = encode(DeltaCome(1.0), fine_tune(), gram_of())
    assert len(ours) == len(theirs) == 3
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left.left.codes, right.left.codes)
        assert torch.equal(left.right.codes, right.right.codes)
        torch.testing.assert_close(left.s, right.s)


def test_each_ingredient_lowers_the_error_of_outputs_at_equal_bytes() -> None:
    bits = 8 * bytes_of(encode(DeltaCome(1.0), fine_tune())) / (ROWS * COLS)  # what Delta-CoMe's groups make of 1
    codecs = [DeltaMix(bits, mixed=mixed, corrected=fixed) for mixed in (False, True) for fixed in (False, True)]
    sizes = [bytes_of(encode(codec, fine_tune(), gram_of())) for codec in codecs]
    assert max(sizes) <= bits * ROWS * COLS / 8
    assert min(sizes) >= 0.97 * max(sizes)
    neither, fixed, mixed, both = map(output_error, codecs)
    assert fixed < 0.9 * neither
    assert mixed < 0.9 * neither
    assert both < 0.9 * min(mixed, fixed)


def test_the_correction_is_least_squares_over_what_v_became() -> None:
    """min ‖Δ·X − U·(A·X)‖ by the normal equations of real inputs."""
    delta, inputs = fine_tune(12, 20), torch.randn(50, 20, generator=torch.Generator().manual_seed(2)).double()
    u, sigma, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    v = quantise_rows(vt[:4].float(), torch.full((4,), 2), None, "least-squares").values()
    a = sigma[:4, None] * v
    moments = Moments.of(delta, a, (inputs.T @ inputs).float())
    best = torch.linalg.lstsq(inputs @ a.T, inputs @ delta.double().T).solution.T

    def error(left: Tensor) -> float:
        return float((inputs @ (delta.double() - left @ a).T).square().sum())

    assert error(corrected(u[:, :4], moments)) == pytest.approx(error(best), rel=1e-3)
    assert error(best) < 0.9 * error(u[:, :4])


def test_a_correction_without_evidence_is_none() -> None:
    u = torch.eye(3, dtype=torch.float64)
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(corrected(u, Moments(nothing.sum(), nothing, nothing)), u)


@pytest.mark.parametrize("bits", [0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(96, 128), (160, 64)], ids=str)
def test_bits_are_a_ceiling_that_is_almost_reached(bits: float, shape: tuple[int, int]) -> None:
    used = 8 * bytes_of(encode(DeltaMix(bits), fine_tune(*shape))) / (shape[0] * shape[1])
    assert 0.85 * bits <= used <= bits


def test_one_rank_is_always_kept() -> None:
    (term,) = encode(DeltaMix(1e-3), fine_tune())
    assert (term.left.bits, term.right.bits, len(term.s)) == (2, 2, 1)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_more_widths_than_allowed(most: int) -> None:
    terms = encode(DeltaMix(1.5, max_widths=most), fine_tune(), gram_of())
    assert len({term.right.bits for term in terms}) == len(terms) <= most
    assert {term.right.bits for term in terms} <= set(WIDTHS)


def test_widths_of_u() -> None:
    same = encode(DeltaMix(1.0, u_bits="same"), fine_tune(), gram_of())
    assert all(term.left.bits == term.right.bits for term in same)
    common = encode(DeltaMix(1.0, u_bits=4), fine_tune(), gram_of())
    assert {term.left.bits for term in common} == {4}
    for terms in (same, common):
        assert bytes_of(terms) == sum(
            group_bytes(len(term.s), ROWS, COLS, term.left.bits, term.right.bits) for term in terms
        )


def test_counting_what_rounding_u_costs_is_better() -> None:
    assert output_error(DeltaMix(1.0, u_bits="same")) < output_error(DeltaMix(1.0, u_bits="same", errors="right"))


def test_stronger_ranks_have_more_bits() -> None:
    terms = encode(DeltaMix(1.5, u_bits="same", max_widths=2), fine_tune())
    strengths = [
        float((term.s * term.left.decode().norm(dim=0) * term.right.decode().norm(dim=1)).min()) for term in terms
    ]
    assert strengths == sorted(strengths, reverse=True)


@pytest.mark.parametrize("gram", [None, gram_of()], ids=["no gram", "gram"])
def test_unbiased_along_delta_as_the_outputs_see_it(gram: Tensor | None) -> None:
    delta, metric = fine_tune(), torch.eye(COLS) if gram is None else gram

    def gain(estimator: Any) -> float:
        decoded = decode(encode(DeltaMix(0.5, estimator=estimator), delta, gram))
        return float(((delta @ metric) * decoded).sum() / ((delta @ metric) * delta).sum())

    assert gain("unbiased") == pytest.approx(1, rel=1e-4)
    assert gain("paper") < 0.99


def test_inputs_that_are_never_seen_are_no_trouble() -> None:
    gram = gram_of()
    gram[:, :40] = gram[:40] = 0
    for given in (gram, torch.zeros(COLS, COLS)):
        assert bool(decode(encode(DeltaMix(0.5), fine_tune(), given)).isfinite().all())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 0}, "bits 0"),
        ({"mixed": 1}, "mixed 1"),
        ({"corrected": "yes"}, "corrected 'yes'"),
        ({"max_widths": 5}, "max_widths 5"),
        ({"u_bits": 5}, "u_bits 5"),
        ({"errors": "left"}, "errors 'left'"),
        ({"errors": "right"}, "errors 'right'"),
        ({"estimator": "fair"}, "estimator 'fair'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(CodecError, match=f"deltamix: {said}"):
        DeltaMix(**options)
