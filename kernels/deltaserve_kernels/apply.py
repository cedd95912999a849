"""One call per kernel family present: which operation serves which term."""

from __future__ import annotations

from torch import Tensor

from deltaserve_kernels.grouped_matmul.naive import coded_matmul, low_rank_matmul
from deltaserve_kernels.sparse_matmul.naive import sparse_matmul
from deltaserve_kernels.terms import LowRank, Term


def apply_term(x: Tensor, term: Term) -> Tensor:
    """x [T, in] → x · Termᵀ [T, out], in x's dtype."""
    if isinstance(term, LowRank):
        return low_rank_matmul(x, term)
    return sparse_matmul(x, term) if term.mask is not None else coded_matmul(x, term)
