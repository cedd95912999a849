"""What codecs on uniform grids share: levels and steps against brute force, zeros, budgets in whole bytes."""

from __future__ import annotations

import pytest
import torch

from deltaserve.codecs.base import Site
from deltaserve.codecs.uniform import (
    affordable,
    fair_zeros,
    fitted_step,
    inner,
    normalised,
    odd_codes,
    odd_levels,
    output_gain,
    unbiased_step,
)
from deltaserve_kernels import layout

SITE = Site(number=5, seed=7)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_levels_and_codes_on_paper() -> None:
    """Two bits, step 1: −3 −1 1 3 are codes 0 1 2 3; 2.0 is halfway between 1 and 3 and goes up."""
    levels = odd_levels(torch.tensor([[-9.0, -1.9, -0.1, 0.0, 1.9, 2.0]]), torch.ones(1, 1), 2)
    assert levels.tolist() == [[-3, -1, -1, 1, 1, 3]]
    assert layout.unpack(odd_codes(levels, 2), 2, 6).tolist() == [[0, 1, 1, 2, 2, 3]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_a_fitted_step_is_within_a_twentieth_of_the_best_error(bits: int) -> None:
    values = normal(3, 2000) * torch.tensor([[1.0], [1e-3], [40.0]])
    error = (values - (step := fitted_step(values, bits)) * odd_levels(values, step, bits)).square().sum(1)
    tried = step * torch.linspace(0.5, 2, 301)  # [3, 301]
    best = torch.stack([(values - s[:, None] * odd_levels(values, s[:, None], bits)).square().sum(1) for s in tried.T])
    assert bool((error <= 1.05 * best.min(0).values).all())


def test_an_unbiased_step_keeps_the_whole_of_the_values_along_themselves() -> None:
    values = normal(4, 300)
    levels = odd_levels(values, fitted_step(values, 2), 2)
    decoded = unbiased_step(values, levels) * levels
    torch.testing.assert_close((values * decoded).sum(1), values.square().sum(1))


def test_rows_of_zeros_have_step_zero() -> None:
    values = torch.zeros(2, 5)
    assert not fitted_step(values, 2).any()
    assert not unbiased_step(values, odd_levels(values, torch.zeros(2, 1), 2)).any()
    assert not fair_zeros(values, SITE).any()


def test_zeros_get_drawn_signs_and_nothing_else_changes() -> None:
    values = normal(50, 80)
    values[:, ::2] = 0
    fair = fair_zeros(values, SITE)
    assert torch.equal(fair[:, 1::2], values[:, 1::2])
    assert abs(float(fair[:, ::2].sign().sum())) < 4 * 2000**0.5
    assert float(fair[:, ::2].abs().max()) < 1e-8
    assert torch.equal(fair, fair_zeros(values, SITE))


@pytest.mark.parametrize("magnitude", [1e-44, 1e-20, 1.0, 3e38])
def test_normalised_is_a_power_of_two_away(magnitude: float) -> None:
    delta = torch.tensor([[magnitude, -magnitude / 2, 0]])
    unit, factor = normalised(delta)
    assert 0.5 <= float(unit.abs().max()) < 1
    assert torch.equal((unit.double() * factor).float(), delta)


def test_inner_products_and_the_gain_under_a_gram_matrix() -> None:
    x = normal(500, 6, seed=1)
    gram = x.T @ x / 500
    left, right = normal(3, 6, seed=2), normal(3, 6, seed=3)
    torch.testing.assert_close(inner(left, right, gram), ((x @ left.T) * (x @ right.T)).mean(0))
    torch.testing.assert_close(inner(left, right, None), (left * right).sum(1))
    assert output_gain(left, 0.8 * left, gram).flatten().tolist() == pytest.approx([1.25] * 3)
    assert output_gain(left, -left, gram).flatten().tolist() == [1, 1, 1]
    assert output_gain(left, 0.01 * left, None).flatten().tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("row_bits", "bits", "cols", "number"),
    [
        (72.0, 4, 576, 18),
        (75.9, 4, 576, 18),
        (68.0, 4, 576, 16),  # 17 codes would take a ninth byte
        (17.3, 1, 576, 16),
        (30.0, 3, 576, 8),  # 9 codes: 3 + 2 bytes; 8 codes: 2 + 1
        (3.0, 1, 576, 8),  # a byte is the least
        (-5.0, 4, 576, 2),
        (-5.0, 4, 1, 1),
        (1e9, 4, 40, 40),
    ],
)
def test_codes_that_a_row_affords(row_bits: float, bits: int, cols: int, number: int) -> None:
    assert affordable(row_bits, bits, cols) == number
