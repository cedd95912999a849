"""Lagrangian relaxation: the budget as a price λ ≥ 0 of a byte. A bound on every solution, and a good one of its own.

    g(λ) = min_x  loss(x) + λ · (cost(x) − budget)   ≤   optimum        for every λ (weak duality)

The minimum is each layer's own without pairs, and a shortest path along the chain of layers (Viterbi) with them. g is
concave and cost(x_λ) falls in λ: bisection finds the λ where the budget is met (Everett, Oper. Res. 11:399, 1963).
Every λ tried gives a bound, every x_λ within the budget a solution; what is best of both is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deltaserve.allocation.problem import Choice, Costs, Losses, Problem

ROUNDS = 60


class Relaxed(NamedTuple):
    bound: float
    choice: Choice  # within the budget


def relax(problem: Problem) -> Relaxed:
    best: Choice = problem.cost.argmin(1)  # within the budget
    bound = -np.inf

    def fits(price: float) -> bool:
        nonlocal best, bound
        choice = cheapest(problem.loss + price * problem.cost, problem.pairs, problem.cost)
        spent, loss = problem.total_cost(choice), problem.total_loss(choice)
        bound = max(bound, loss + price * (spent - problem.budget))
        if spent <= problem.budget:
            best = min(best, choice, key=problem.total_loss)
        return spent <= problem.budget

    if not fits(0.0):
        low, high = 0.0, float(np.ptp(problem.loss)) / max(problem.budget, 1) or 1.0
        while not fits(high):
            low, high = high, 4 * high
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
    return Relaxed(bound, best)


def cheapest(loss: Losses, pairs: Losses | None, cost: Costs) -> Choice:
    """argmin_x Σ loss[l, x_l] + Σ pairs[l, x_l, x_{l+1}]; without pairs, the one of lower cost among equals."""
    if pairs is None:
        return first(loss, cost)
    reach = loss[0]  # [O] least loss of layers 0 … l, by the option of layer l
    came = np.zeros(loss.shape, np.int64)
    for layer in range(1, len(loss)):
        via = reach[:, None] + pairs[layer - 1]
        came[layer] = via.argmin(0)
        reach = via.min(0) + loss[layer]
    choice = np.zeros(len(loss), np.int64)
    choice[-1] = reach.argmin()
    for layer in range(len(loss) - 1, 0, -1):
        choice[layer - 1] = came[layer, choice[layer]]
    return choice


def first(by: Losses | Costs, then: Losses | Costs) -> Choice:
    """[L] the least option of each row of [L, O], by the one and then by the other."""
    order: Choice = np.lexsort((then, by), axis=1)[:, 0].astype(np.int64)
    return order
