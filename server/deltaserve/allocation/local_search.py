"""One layer at a time: bring a choice within its budget, then take what still pays."""

from __future__ import annotations

import numpy as np

from deltaserve.allocation.problem import Choice, Losses, Problem


def repaired(problem: Problem, choice: Choice) -> Choice:
    """Within the budget, by the changes that add the least loss for a byte saved."""
    choice = choice.copy()
    layers = np.arange(len(choice))
    while problem.total_cost(choice) > problem.budget:
        saved = problem.cost[layers, choice][:, None] - problem.cost
        price = np.where(saved > 0, changes(problem, choice) / np.maximum(saved, 1), np.inf)
        layer, option = divmod(int(price.argmin()), price.shape[1])
        choice[layer] = option
    return choice


def improved(problem: Problem, choice: Choice) -> Choice:
    """A choice within the budget, until no change of one layer lowers the loss."""
    choice = choice.copy()
    layers = np.arange(len(choice))
    while True:
        spent = problem.cost - problem.cost[layers, choice][:, None]
        affordable = spent <= problem.budget - problem.total_cost(choice)
        change = np.where(affordable, changes(problem, choice), 0)
        layer, option = divmod(int(change.argmin()), change.shape[1])
        tried = choice.copy()
        tried[layer] = option
        if not problem.total_loss(tried) < problem.total_loss(choice):
            return choice
        choice = tried


def changes(problem: Problem, choice: Choice) -> Losses:
    """[L, O]: what the loss changes by when one layer changes to an option."""
    layers = np.arange(len(choice))
    at = problem.loss.copy()
    if problem.pairs is not None:
        at[1:] += problem.pairs[layers[:-1], choice[:-1]]
        at[:-1] += problem.pairs[layers[:-1], :, choice[1:]]
    return at - at[layers, choice][:, None]
