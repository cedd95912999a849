"""Definition of the sparse matmul: a weighted gather-sum over the surviving columns.

    y[t, n] = row[n] · Σ_g grid(codes)[n, g] · x[t, columns[n, g]]

Activations are gathered, weights are never spread out: no [rows, cols] matrix is made.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels.terms.coded import Coded


def sparse_matmul(x: Tensor, term: Coded) -> Tensor:
    """x [T, cols] → [T, rows], both of x's dtype. `term` is in serving form (`serving`)."""
    assert term.columns is not None, "a masked term is served from its spelled-out columns"
    if term.col is not None:
        x = x * term.col.to(x.dtype)
    weights = term.values(x.dtype)  # [rows, groups]
    y = F.embedding_bag(term.columns.int(), x.t().contiguous(), per_sample_weights=weights, mode="sum").t()
    return y if term.row is None else y * term.row.to(x.dtype).flatten()
