"""Definition of the grouped matmul, reference of its tests, and the path that runs where no fused kernel does.

    coded      y = ((x · diag(col)) · grid(codes)ᵀ) · diag(row)
    low rank   y = ((x · Rᵀ) ⊙ s) · Lᵀ                            shrink, then expand: two coded matmuls

The codes go into the product as exact small integers; scales multiply activations, never weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels.terms import Coded, LowRank


def coded_matmul(x: Tensor, term: Coded) -> Tensor:
    """x [T, cols] → [T, rows], both of x's dtype. `term` has no mask."""
    if term.col is not None:
        x = x * term.col.to(x.dtype)
    y = F.linear(x, term.values(x.dtype))
    return y if term.row is None else y * term.row.to(x.dtype).flatten()


def low_rank_matmul(x: Tensor, term: LowRank) -> Tensor:
    """x [T, cols] → [T, rows], both of x's dtype."""
    return coded_matmul(coded_matmul(x, term.right) * term.s.to(x.dtype), term.left)
