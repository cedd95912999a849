"""Rounded factors: steps against a search, error feedback, and what the moments say of a product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, decode
from deltaserve.codecs.rank_factors import (
    Factor,
    bit_groups,
    fit_step,
    low_rank_terms,
    quantise_columns,
    quantise_left,
    quantise_left_together,
    quantise_rows,
)
from deltaserve.codecs.rank_moments import Moments
from deltaserve.codecs.uniform import nearest


def matrix(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def gram_of(cols: int) -> Tensor:
    inputs = matrix(4 * cols, cols, seed=1) @ matrix(cols, cols, seed=2)
    return inputs.T @ inputs / len(inputs)


def highest(*bits: int) -> Tensor:
    return torch.tensor([[2.0**b - 1] for b in bits])


def test_nearest_levels_on_paper() -> None:
    values = torch.tensor([[-9.0, -2.1, -0.1, 0.1, 1.9, 2.1, 9]])
    assert nearest(values, torch.ones(1, 1), highest(2)).tolist() == [[-3, -3, -1, 1, 1, 3, 3]]
    assert nearest(values, torch.ones(1, 1), highest(1)).tolist() == [[-1, -1, -1, 1, 1, 1, 1]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_step_is_about_that_of_least_squares(bits: int) -> None:
    rows = torch.cat((matrix(3, 200), matrix(3, 200) ** 3))  # the second three have heavy tails

    def error(step: Tensor) -> Tensor:
        return (nearest(rows, step, highest(bits)) * step - rows).square().sum(1)

    searched = torch.stack([error(rows.abs().amax(1, keepdim=True) * k / 200 / (2**bits - 1)) for k in range(1, 201)])
    assert (error(fit_step(rows, highest(bits), "least-squares")) <= searched.amin(0) * 1.2).all()


def test_the_peak_step_reaches_the_largest_entry() -> None:
    assert fit_step(torch.tensor([[1.0, -6, 2]]), highest(2), "peak").tolist() == [[2]]


def test_rows_without_a_gram_are_rounded_by_themselves() -> None:
    rows, bits = matrix(4, 150), torch.tensor([1, 2, 3, 8])
    factor = quantise_rows(rows, bits, None, "least-squares")
    step = fit_step(rows, highest(1, 2, 3, 8), "least-squares")
    assert torch.equal(factor.levels, nearest(rows, step, highest(1, 2, 3, 8)))
    assert torch.equal(factor.values(), factor.levels * step)


def test_rows_of_several_widths_do_not_know_each_other() -> None:
    rows, gram = matrix(3, 40), gram_of(40)
    together = quantise_rows(rows, torch.tensor([2, 3, 8]), gram, "least-squares")
    for index, bits in enumerate((2, 3, 8)):
        alone = quantise_rows(rows[index : index + 1], torch.tensor([bits]), gram, "least-squares")
        assert torch.equal(alone.levels[0], together.levels[index])


@pytest.mark.parametrize("group", [None, 16])
def test_feedback_lowers_the_error_of_outputs(group: int | None) -> None:
    rows, gram, bits = matrix(6, 40), gram_of(40), torch.full((6,), 2)
    errors = []
    for given in (gram, None):
        missed = quantise_rows(rows, bits, given, "least-squares", group).values() - rows
        errors.append(float(((missed @ gram) * missed).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_columns_are_rounded_like_rows() -> None:
    columns, bits = matrix(30, 5), torch.tensor([1, 2, 3, 4, 8])
    factor = quantise_columns(columns, bits, torch.eye(5), "least-squares")
    assert torch.equal(factor.levels.T, quantise_rows(columns.T, bits, None, "least-squares").levels)
    torch.testing.assert_close(factor.values(), factor.levels * factor.rank_step)


def test_steps_of_groups_are_stored_and_rounded_first() -> None:
    factor = quantise_rows(matrix(3, 40), torch.full((3,), 3), None, "peak", 16)
    assert factor.group_step is not None
    assert (factor.group_step.dtype, factor.group_step.shape) == (torch.bfloat16, (3, 3))
    assert torch.equal(factor.coded(3).decode(), factor.values())


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_codes_are_the_levels(bits: int) -> None:
    factor = quantise_rows(matrix(3, 21), torch.full((3,), bits), None, "least-squares")
    assert torch.equal(factor.coded(bits).decode(), factor.levels)


def test_ranks_of_equal_widths_are_found_widest_first() -> None:
    groups = bit_groups(torch.tensor([2, 4, 2, 4]), torch.tensor([3, 4, 3, 2]))
    assert [(u, v, ranks.tolist()) for u, v, ranks in groups] == [(4, 4, [1]), (4, 2, [3]), (2, 3, [0, 2])]


@pytest.mark.parametrize("gram", [None, gram_of(12)], ids=["no gram", "gram"])
def test_moments_are_the_error_of_outputs(gram: Tensor | None) -> None:
    delta, u, a = matrix(8, 12), matrix(8, 3, seed=3), matrix(3, 12, seed=4)
    moments = Moments.of(delta, a, gram)
    missed = (delta - u @ a).double()
    direct = float((missed @ (torch.eye(12) if gram is None else gram).double()).mul(missed).sum())
    u = u.double()
    said = moments.power - 2 * (moments.cross * u).sum() + ((u @ moments.coupling) * u).sum()
    assert float(said) == pytest.approx(direct, rel=1e-6)


def product(estimator: Estimator) -> tuple[Tensor, Tensor, Factor, Tensor]:
    """Δ, Δ̂, V̂ and σ of three ranks at two widths, Δ in units of 8."""
    delta, gram = (matrix(10, 10, seed=8) * torch.linspace(0, -4, 10).exp()) @ matrix(10, 14), gram_of(14)
    u, sigma, vt = torch.linalg.svd(delta, full_matrices=False)
    bits = torch.tensor([4, 2, 2])
    v = quantise_rows(vt[:3], bits, gram, "least-squares")
    moments = Moments.of(delta, sigma[:3, None] * v.values(), gram)
    pieces = quantise_left(u[:, :3], bits, bits, moments, "least-squares")
    return delta, decode(low_rank_terms(sigma[:3], pieces, v, moments, estimator, 8.0)) / 8, v, sigma[:3]


def test_terms_are_the_sum_of_the_ranks() -> None:
    delta, decoded, v, sigma = product("paper")
    left = torch.linalg.lstsq((sigma[:, None] * v.values()).T, decoded.T).solution.T  # Û again
    torch.testing.assert_close((left * sigma) @ v.values(), decoded, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(decoded) == 3
    assert float((delta - decoded).norm() / delta.norm()) < 1


def test_unbiased_means_unbiased_in_outputs() -> None:
    gram = gram_of(14)
    delta, decoded, _, _ = product("unbiased")
    assert float(((delta @ gram) * decoded).sum()) == pytest.approx(float(((delta @ gram) * delta).sum()), rel=1e-5)
    paper = product("paper")[1]
    torch.testing.assert_close(decoded / decoded.norm(), paper / paper.norm())


def test_errors_cross_widths_only_together() -> None:
    """With ranks that are alike, the second term makes up for what the first has missed."""
    delta, gram = matrix(30, 14), gram_of(14)
    a = matrix(1, 14, seed=5).repeat(4, 1) + 0.3 * matrix(4, 14, seed=6)
    moments, bits = Moments.of(delta, a, gram), torch.tensor([3, 3, 2, 2])
    target = matrix(30, 4, seed=7)
    errors = []
    for quantise in (quantise_left, quantise_left_together):
        missed = torch.empty_like(target)
        for piece in quantise(target, bits, bits, moments, "least-squares"):
            missed[:, piece.ranks] = piece.u.values() - target[:, piece.ranks]
        errors.append(float(((missed.double() @ moments.coupling) * missed).sum()))
    assert errors[1] < 0.9 * errors[0]
