"""Every solver against all choices of small problems, and what holds at any size."""

from __future__ import annotations

import builtins
import itertools
from typing import Any

import numpy as np
import pytest

from deltaserve.allocation.problem import Problem
from deltaserve.allocation.relaxation import relax
from deltaserve.allocation.solvers import SOLVERS
from deltaserve.errors import CodecError

EXACT = ("dynamic", "ilp")
WITH_PAIRS = sorted(SOLVERS.keys() - {"dynamic"})


def problem(seed: int, layers: int = 5, options: int = 4, share: float = 0.5, *, pairs: bool = False) -> Problem:
    """Costs that rise and losses that fall over the options, the layers' losses far apart."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 60, (layers, options)).cumsum(1)
    worth = np.exp(rng.normal(0, 2, (layers, 1)))
    loss = worth * -np.sort(-rng.random((layers, options)), axis=1)
    least, most = cost.min(1).sum(), cost.max(1).sum()
    between = 0.2 * rng.random((layers - 1, options, options)) * worth[1:, :, None] if pairs else None
    return Problem(cost, loss, int(least + share * (most - least)), between)


def every(of: Problem) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    layers, options = of.cost.shape
    choices = [np.array(choice) for choice in itertools.product(range(options), repeat=layers)]
    return [choice for choice in choices if of.total_cost(choice) <= of.budget]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_no_solution_is_better_than_its_bound_says(name: str, share: float) -> None:
    for seed in range(6):
        tiny = problem(seed, share=share)
        optimum = min(map(tiny.total_loss, every(tiny)))
        if name == "uniform" and share == 0:
            assert SOLVERS[name](tiny).cost == tiny.budget  # all at their cheapest
            continue
        found = SOLVERS[name](tiny)
        assert found.cost == tiny.total_cost(found.choice) <= tiny.budget
        assert found.loss == pytest.approx(tiny.total_loss(found.choice))
        assert found.bound - 1e-9 <= optimum <= found.loss + 1e-12
        assert found.gap >= 0
        if name in EXACT:
            assert found.loss == pytest.approx(optimum, rel=1e-6)


@pytest.mark.parametrize("name", WITH_PAIRS)
def test_pairs_count(name: str) -> None:
    for seed in range(6):
        chain = problem(seed, share=0.4, pairs=True)
        optimum = min(map(chain.total_loss, every(chain)))
        found = SOLVERS[name](chain)
        assert found.cost <= chain.budget
        assert found.bound - 1e-9 <= optimum <= found.loss + 1e-12
        if name == "ilp":
            assert found.loss == pytest.approx(optimum, rel=1e-6)
            assert found.gap < 1e-5


def test_dynamic_programming_takes_no_pairs() -> None:
    with pytest.raises(ValueError, match="takes no pairs"):
        SOLVERS["dynamic"](problem(0, pairs=True))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_larger_budget_is_no_worse(name: str) -> None:
    shares = [0.2, 0.4, 0.6, 0.8, 1.0]
    losses = [SOLVERS[name](problem(3, layers=40, share=share)).loss for share in shares]
    assert losses == sorted(losses, reverse=True)
    most = problem(3, layers=40)
    assert losses[-1] == pytest.approx(most.loss[:, -1].sum())  # the best of all fits: everybody finds it


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_problem_has_the_same_solution(name: str) -> None:
    first, second = (SOLVERS[name](problem(1, layers=20)) for _ in range(2))
    assert first.choice.tolist() == second.choice.tolist()
    assert first.bound == second.bound


@pytest.mark.parametrize("name", SOLVERS)
def test_among_equals_the_budget_still_holds(name: str) -> None:
    """All layers alike: whoever gets more, the loss is the same."""
    tied = Problem(np.array([[10, 20]] * 5), np.array([[2.0, 1.0]] * 5), 80)
    found = SOLVERS[name](tied)
    assert found.loss == (10.0 if name in ("uniform", "threshold") else 7.0)
    assert found.cost <= 80
    free = Problem(np.array([[10, 20]] * 5), np.ones((5, 2)), 100)  # nothing to gain by paying more
    assert SOLVERS[name](free).loss == 5.0


def test_many_layers_come_close_to_the_bound() -> None:
    large = problem(0, layers=200, options=7)
    for name in ("dynamic", "gradient", "ilp", "lagrangian"):
        assert SOLVERS[name](large).gap < 2e-3, name
    chain = problem(0, layers=200, options=7, pairs=True)
    assert SOLVERS["lagrangian"](chain).gap < 5e-3


def test_the_threshold_makes_the_largest_loss_least() -> None:
    for seed in range(6):
        tiny = problem(seed)
        layers = np.arange(len(tiny.cost))
        least = min(tiny.loss[layers, choice].max() for choice in every(tiny))
        assert tiny.loss[layers, SOLVERS["threshold"](tiny).choice].max() == least


def test_dynamic_programming_with_a_coarse_unit_keeps_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaserve.allocation import solvers

    exact = solvers.dynamic(problem(5, layers=30))
    monkeypatch.setattr(solvers, "CELLS", 16)
    coarse = solvers.dynamic(problem(5, layers=30))
    assert exact.loss <= coarse.loss < 1.5 * exact.loss


def test_the_bound_is_reached_where_the_budget_does_not_bind() -> None:
    bound, choice = relax(problem(2, share=1.0))
    assert bound == problem(2, share=1.0).total_loss(choice)


def test_a_budget_under_the_least_names_it() -> None:
    with pytest.raises(CodecError, match="a budget of 29 bytes is under 30, the least that these layers cost"):
        Problem(np.array([[10, 20], [40, 20]]), np.ones((2, 2)), 29)
    crossed = Problem(np.array([[10, 20], [40, 20]]), np.ones((2, 2)), 30)
    assert SOLVERS["dynamic"](crossed).choice.tolist() == [0, 1]
    with pytest.raises(CodecError, match="30 bytes is under 40, the least of one option for all"):
        SOLVERS["uniform"](crossed)


def test_what_is_no_problem_is_refused() -> None:
    for cost, loss, pairs in (
        (np.ones((2, 2), np.int64), np.ones((2, 3)), None),
        (np.ones((0, 2), np.int64), np.ones((0, 2)), None),
        (np.ones((2, 2), np.int64), np.full((2, 2), np.nan), None),
        (-np.ones((2, 2), np.int64), np.ones((2, 2)), None),
        (np.ones((2, 2), np.int64), np.ones((2, 2)), np.ones((2, 2, 2))),
    ):
        with pytest.raises(ValueError):
            Problem(cost, loss, 10, pairs)


def test_ilp_without_scipy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "scipy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CodecError, match=r"deltaserve\[allocate\]"):
        SOLVERS["ilp"](problem(0))
