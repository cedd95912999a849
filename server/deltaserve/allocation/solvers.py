"""Every way to solve a Problem, by name: `solve(problem) -> Allocation`, deterministic, never beyond the budget.

uniform      one option for all layers, the best that fits
threshold    every layer its cheapest option with a loss ≤ β (or its best), for the least β that fits: exact for the
             largest loss, not for the sum. After a summary of FMPQ (arXiv 2506.01221): the fewest bits with ζ_n < β,
             a search on β for the budget; there ζ_n is the relative growth of the loss by quantising layer n alone
lagrangian   relaxation.py, then single changes that still pay; for pairs too
dynamic      dynamic programming over bytes, as HIGGS (arXiv 2411.17525) solves its knapsack [abstract]: exact where
             the costs are multiples of a unit of at least (budget − least)/CELLS; rounded up to it otherwise
ilp          integer program by HiGHS, exact to its tolerance (1e-6 of the loss); pairs as flows of options
gradient     a softmax over the options of every layer, descended with Adam at a price of a byte that follows the
             overspending, then the likeliest options, repaired. After AQ-BERT (arXiv 2112.14938), which learns such
             a choice together with the weights; here, after training, only the choice is left, and its losses are
             the table's
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deltaserve.allocation.local_search import improved, repaired
from deltaserve.allocation.problem import Allocation, Choice, Losses, Problem
from deltaserve.allocation.relaxation import first, relax
from deltaserve.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable

CELLS = 2**16
STEPS, RATE, PRICE_RATE = 600, 0.1, 0.05
DECAY, SQUARES_DECAY = 0.9, 0.95  # of Adam
PULL = 0.02  # of the logits towards 0 at every step: an option that was out can come back
ILP_GAP, ILP_SECONDS = 1e-6, 120.0


def uniform(problem: Problem) -> Allocation:
    layers, options = problem.cost.shape
    same = [np.full(layers, option) for option in range(options)]
    fitting = [choice for choice in same if problem.total_cost(choice) <= problem.budget]
    if not fitting:
        least = min(map(problem.total_cost, same))
        raise CodecError(f"a budget of {problem.budget} bytes is under {least}, the least of one option for all layers")
    return problem.allocation(min(fitting, key=problem.total_loss), relax(problem).bound)


def threshold(problem: Problem) -> Allocation:
    thresholds = np.unique(problem.loss)  # ascending
    reach = problem.loss.min(1, keepdims=True)

    def choice_at(index: int) -> Choice:
        allowed = problem.loss <= np.maximum(thresholds[index], reach)
        return first(np.where(allowed, problem.cost, np.iinfo(np.int64).max), problem.loss)

    low, high = 0, len(thresholds) - 1  # at the highest all layers have their cheapest option
    while low < high:
        middle = (low + high) // 2
        fits = problem.total_cost(choice_at(middle)) <= problem.budget
        low, high = (low, middle) if fits else (middle + 1, high)
    return problem.allocation(choice_at(high), relax(problem).bound)


def lagrangian(problem: Problem) -> Allocation:
    bound, choice = relax(problem)
    return problem.allocation(improved(problem, choice), bound)


def dynamic(problem: Problem) -> Allocation:
    _without_pairs(problem, "dynamic programming")
    least = problem.cost.min(1)
    extra = problem.cost - least[:, None]
    room = min(problem.budget - int(least.sum()), int(extra.max(1).sum()))
    unit = max(int(np.gcd.reduce(extra, axis=None)), -(-room // CELLS), 1)
    weights, cells = -(-extra // unit), room // unit
    best = np.zeros(cells + 1)  # least loss of the layers so far within so many units
    chosen = np.zeros((len(extra), cells + 1), np.uint16)
    for layer, (weight, loss) in enumerate(zip(weights, problem.loss, strict=True)):
        table = np.full((len(weight), cells + 1), np.inf)
        for option, units in enumerate(weight):
            if units <= cells:
                table[option, units:] = best[: cells + 1 - units] + loss[option]
        chosen[layer] = table.argmin(0)
        best = table.min(0)
    choice = np.zeros(len(extra), np.int64)
    left = cells
    for layer in reversed(range(len(extra))):
        choice[layer] = chosen[layer, left]
        left -= int(weights[layer, choice[layer]])
    return problem.allocation(improved(problem, choice), relax(problem).bound)


def ilp(problem: Problem) -> Allocation:
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise CodecError("ilp: needs scipy: pip install 'deltaserve[allocate]'") from None
    layers, options = problem.cost.shape
    relaxed = relax(problem)
    scale = 1e4 / (max(abs(relaxed.bound), problem.total_loss(relaxed.choice) - relaxed.bound) or 1.0)
    least = problem.cost.min(1)
    extra = problem.cost - least[:, None]
    unit = max(int(np.gcd.reduce(extra, axis=None)), 1)
    one: Any = sparse.kron(sparse.eye(layers), np.ones((1, options)))  # one option a layer
    rows, bounds = [one], [np.ones(layers)]
    objective = [problem.loss.ravel()]
    if problem.pairs is not None and layers > 1:  # y[l, o, p] ≥ 0 with margins x[l, o] and x[l + 1, p]
        objective.append(problem.pairs.ravel())
        left = sparse.kron(sparse.eye(layers - 1), sparse.kron(sparse.eye(options), np.ones((1, options))))
        right = sparse.kron(sparse.eye(layers - 1), sparse.kron(np.ones((1, options)), sparse.eye(options)))
        chosen = sparse.eye(layers * options, format="csr")
        rows = [
            sparse.hstack([one, sparse.csr_array((layers, left.shape[1]))]),
            sparse.hstack([-chosen[:-options], left]),
            sparse.hstack([-chosen[options:], right]),
        ]
        bounds += [np.zeros(left.shape[0]), np.zeros(right.shape[0])]
    size = sum(map(len, objective))
    weights = np.zeros((1, size))
    weights[0, : layers * options] = extra.ravel() // unit
    equal = np.concatenate(bounds)
    found = optimize.milp(
        np.concatenate(objective) * scale,
        integrality=np.arange(size) < layers * options,
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(sparse.vstack(rows), equal, equal),
            optimize.LinearConstraint(weights, ub=(problem.budget - int(least.sum())) // unit),
        ],
        options={"mip_rel_gap": ILP_GAP, "time_limit": ILP_SECONDS},
    )
    bound = relaxed.bound if found.mip_dual_bound is None else max(relaxed.bound, found.mip_dual_bound / scale)
    choices = [relaxed.choice]
    if found.x is not None:
        choices.append(repaired(problem, found.x[: layers * options].reshape(layers, options).argmax(1)))
    best = min((improved(problem, choice) for choice in choices), key=problem.total_loss)
    return problem.allocation(best, bound)


def gradient(problem: Problem) -> Allocation:
    spread = np.ptp(problem.loss) or 1.0
    price = float(np.ptp(problem.loss, axis=1).sum() / max(np.ptp(problem.cost, axis=1).sum(), 1)) or 1.0
    logits = np.zeros(problem.cost.shape)
    mean, squares = np.zeros_like(logits), np.zeros_like(logits)
    for step in range(1, STEPS + 1):
        shares = _softmax(logits)  # [L, O]
        spent = float((shares * problem.cost).sum())
        price *= float(np.exp(np.clip(PRICE_RATE * (spent / max(problem.budget, 1) - 1), -0.5, 0.5)))
        slope = (problem.loss + _from_pairs(problem, shares) + price * problem.cost) / spread
        slope = shares * (slope - (shares * slope).sum(1, keepdims=True))
        mean = DECAY * mean + (1 - DECAY) * slope
        squares = SQUARES_DECAY * squares + (1 - SQUARES_DECAY) * slope**2
        root = np.sqrt(squares / (1 - SQUARES_DECAY**step))
        logits -= RATE * mean / (1 - DECAY**step) / np.where(root > 0, root, 1) + PULL * logits
    choice = repaired(problem, _softmax(logits).argmax(1))
    return problem.allocation(improved(problem, choice), relax(problem).bound)


def _softmax(logits: Losses) -> Losses:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares: Losses = powers / powers.sum(1, keepdims=True)
    return shares


def _from_pairs(problem: Problem, shares: Losses) -> Losses:
    """[L, O]: what an option adds to the expected loss of its layer's pairs."""
    added = np.zeros_like(shares)
    if problem.pairs is not None:
        added[:-1] += np.einsum("lop,lp->lo", problem.pairs, shares[1:])
        added[1:] += np.einsum("lop,lo->lp", problem.pairs, shares[:-1])
    return added


def _without_pairs(problem: Problem, what: str) -> None:
    if problem.pairs is not None:
        raise ValueError(f"{what} takes no pairs")


SOLVERS: dict[str, Callable[[Problem], Allocation]] = {
    "dynamic": dynamic,
    "gradient": gradient,
    "ilp": ilp,
    "lagrangian": lagrangian,
    "threshold": threshold,
    "uniform": uniform,
}
