"""One call per kernel family present: which operation serves which term."""

from __future__ import annotations

from torch import Tensor

from deltaserve_kernels.codebook_matmul.naive import codebook_matmul
from deltaserve_kernels.grouped_matmul.naive import coded_matmul, patch_matmul
from deltaserve_kernels.sparse_matmul.naive import sparse_matmul
from deltaserve_kernels.terms import Codebook, Coded, Exact, LowRank, Patches, Placed, Rotated, Term


def apply_term(x: Tensor, term: Term) -> Tensor:
    """x [T, in] → x · Termᵀ [T, out], in x's dtype. `term` is in serving form."""
    match term:
        case Coded():
            return sparse_matmul(x, term) if term.mask is not None else coded_matmul(x, term)
        case LowRank():
            return apply_term(apply_term(x, term.right) * term.s.to(x.dtype), term.left)
        case Codebook():
            return codebook_matmul(x, term)
        case Patches():
            return patch_matmul(x, term)
        case Placed():
            assert term.columns is not None, "a placed term is served with its columns"
            return apply_term(x[:, term.columns], term.term)
        case Rotated():
            y = apply_term(term.t_in.forward(x) if term.t_in else x, term.term)
            return term.t_out.inverse(y) if term.t_out else y
        case Exact():
            raise TypeError("an exact term is decoded at load: its serving form is a Coded")
