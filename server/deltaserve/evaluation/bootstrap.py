"""Is one score better than another on the same rows, or is it luck?"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


class Difference(NamedTuple):
    """mean(a) − mean(b), and the interval that holds it with the asked confidence."""

    mean: float
    low: float
    high: float


def bootstrap_difference(
    hits_a: Sequence[float], hits_b: Sequence[float], *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Paired percentile bootstrap (Efron 1979): rows are drawn with replacement, both scores of a row together.

    A hit is a bool, or a row's share of hits over several seeds. A sample of rows is a multinomial count of each
    distinct difference, so that it costs no more with more rows.
    """
    if len(hits_a) != len(hits_b) or not len(hits_a):
        raise ValueError(f"{len(hits_a)} and {len(hits_b)} rows: the same rows are compared, and at least one")
    differences = np.asarray(hits_a, dtype=np.float64) - np.asarray(hits_b, dtype=np.float64)
    values, counts = np.unique(differences, return_counts=True)
    rows = len(differences)
    drawn = np.random.default_rng(seed).multinomial(rows, counts / rows, size=samples)  # int64 [samples, values]
    low, high = np.quantile(drawn @ values / rows, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(differences.mean()), float(low), float(high))
