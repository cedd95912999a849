"""The forms of a mixture against their definitions in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from deltaserve.engine.mixtures import combine
from deltaserve.engine.types import Mixture

V = 9
WEIGHTS = (0.5, 0.3, 0.2)


def logits_of(seed: int, rows: int = 2) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def reference(logits: list[list[float]], weights: tuple[float, ...], alpha: float, history: list[float]) -> list[float]:
    """Probabilities, from those of each model, p: Π pʷ, or (Σ w · (P · p) ** −alpha) ** (−1/alpha)."""
    models = []
    for row in logits:
        total = sum(map(math.exp, row))
        models.append([math.exp(value) / total for value in row])
    made = []
    for token in range(len(logits[0])):
        ps = [p[token] for p in models]
        if alpha == 0:
            made.append(math.prod(p**w for p, w in zip(ps, weights, strict=True)))
        else:
            terms = zip(ps, weights, history, strict=True)
            made.append(sum(w * (math.exp(past) * p) ** -alpha for p, w, past in terms) ** (-1 / alpha))
    return [value / sum(made) for value in made]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_each_form_is_its_definition(alpha: float) -> None:
    logits, history = [logits_of(seed) for seed in range(3)], [-2.0, -3.5, -1.0]
    found = combine(Mixture(WEIGHTS, alpha), logits, history).exp()
    for row in range(2):
        expected = reference([own[row].tolist() for own in logits], WEIGHTS, alpha, history)
        assert found[row].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_equal_models_are_that_model(alpha: float) -> None:
    logits = logits_of(1)
    found = combine(Mixture(WEIGHTS, alpha), [logits] * 3, [-4.0] * 3)
    torch.testing.assert_close(found, logits.log_softmax(-1))


def test_a_small_alpha_is_nearly_linear() -> None:
    logits = [logits_of(seed) for seed in range(3)]
    linear, near = (combine(Mixture(WEIGHTS, alpha), logits, [0.0] * 3) for alpha in (0.0, 1e-3))
    torch.testing.assert_close(near, linear, atol=2e-2, rtol=0)


def test_forward_kl_listens_to_the_model_that_finds_the_text_less_likely() -> None:
    logits = [logits_of(seed) for seed in range(2)]
    found = combine(Mixture((0.5, 0.5), 1.0), logits, [0.0, -60.0])
    torch.testing.assert_close(found, logits[1].log_softmax(-1))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_one_model_excludes_the_mixture_excludes_and_the_rest_stays_finite(alpha: float) -> None:
    logits = [logits_of(seed) for seed in range(3)]
    logits[1][0, 4] = -torch.inf
    found = combine(Mixture(WEIGHTS, alpha), logits, [-900.0, -1200.0, 0.0])
    assert found[0, 4] == -torch.inf
    assert found.isfinite().sum() == 2 * V - 1


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_damage_in_one_model_is_damage_in_its_own_row_of_the_mixture(alpha: float, damage: float) -> None:
    logits = [logits_of(seed) for seed in range(3)]
    logits[2][1, 0] = damage
    found = combine(Mixture(WEIGHTS, alpha), logits, [0.0] * 3)
    assert found[0].isfinite().all()
    assert not found[1].amax().isfinite()
