"""Which option each layer gets under one budget of bytes: the problem, and what a solution is worth.

    minimise    Σ_l loss[l, x_l]  +  Σ_l pairs[l, x_l, x_{l+1}]        over x, one option a layer
    subject to  Σ_l cost[l, x_l]  ≤  budget

Without pairs this is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, "Knapsack Problems", ch. 11);
pairs make it quadratic, along a chain of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import CodecError

Costs = NDArray[np.int64]
Losses = NDArray[np.float64]
Choice = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """Raises CodecError, naming the least that the layers cost, where the budget is under it."""

    cost: Costs  # [L, O] bytes, ≥ 0
    loss: Losses  # [L, O]
    budget: int  # bytes
    pairs: Losses | None = None  # [L − 1, O, O] of layer l at its option, and layer l + 1 at its own

    def __post_init__(self) -> None:
        layers, options = self.cost.shape
        shapes: list[tuple[Any, tuple[int, ...]]] = [(self.loss, (layers, options))]
        if self.pairs is not None:
            shapes.append((self.pairs, (max(layers - 1, 0), options, options)))
        if not layers or not options or any(array.shape != shape for array, shape in shapes):
            raise ValueError(
                f"cost {self.cost.shape}, loss {self.loss.shape}: not [L, O] with L, O ≥ 1, or other pairs"
            )
        if not all(np.isfinite(array).all() for array, _ in shapes) or (self.cost < 0).any():
            raise ValueError("losses have to be finite, costs ≥ 0")
        if self.budget < (least := int(self.cost.min(1).sum())):
            raise CodecError(f"a budget of {self.budget} bytes is under {least}, the least that these layers cost")

    def total_cost(self, choice: Choice) -> int:
        return int(self.cost[np.arange(len(choice)), choice].sum())

    def total_loss(self, choice: Choice) -> float:
        layers = np.arange(len(choice))
        total = self.loss[layers, choice].sum()
        if self.pairs is not None:
            total += self.pairs[layers[:-1], choice[:-1], choice[1:]].sum()
        return float(total)

    def allocation(self, choice: Choice, bound: float) -> Allocation:
        """Raises ValueError for a choice beyond the budget."""
        cost, loss = self.total_cost(choice), self.total_loss(choice)
        if cost > self.budget:
            raise ValueError(f"a choice of {cost} bytes, the budget is {self.budget}")
        return Allocation(choice, loss, cost, min(bound, loss))


@dataclass(frozen=True, eq=False)
class Allocation:
    choice: Choice  # [L] option of each layer
    loss: float
    cost: int  # bytes
    bound: float  # no choice within the budget has less loss; at most `loss`, equal where that is the optimum

    @property
    def gap(self) -> float:
        """At most this share of the bound above the optimum."""
        return (self.loss - self.bound) / abs(self.bound) if self.loss > self.bound else 0.0
