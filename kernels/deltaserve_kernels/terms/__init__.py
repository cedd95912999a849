"""The terms of the algebra: what a compressed linear layer is made of, as packed tensors.

    Δ̂ = Σ_j Term_j                                            [rows, cols] = [out, in]

    Coded     diag(row) · grid(codes) · diag(col) ⊙ M          a value for each entry, or for each survivor of a mask
    LowRank   Coded(L) · diag(s) · Coded(R)
    Codebook  scale · C[codes]                                 a vector of a shared table for each block
    Patches   square tiles, the absent ones zero
    Placed    a term on some of the column blocks, the others zero
    Rotated   T_outᵀ · Term · T_in                             block Hadamard or block DCT, on activations when served
    Exact     entropy-coded, decoded at load

Each holds its tensors and nothing else; `decode` is its definition, float32 [rows, cols]; `serving` is the form that
the kernels read. Source: ours; codecs map papers onto it.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

from deltaserve_kernels.terms.books import Book
from deltaserve_kernels.terms.codebook import Codebook
from deltaserve_kernels.terms.coded import Coded, Grid
from deltaserve_kernels.terms.exact import Exact
from deltaserve_kernels.terms.low_rank import LowRank
from deltaserve_kernels.terms.masks import ExplicitMask, SeededMask
from deltaserve_kernels.terms.patches import Patches
from deltaserve_kernels.terms.placed import Placed
from deltaserve_kernels.terms.rotated import Rotated, Rotation

Term: TypeAlias = Coded | LowRank | Codebook | Patches | Placed | Rotated | Exact

__all__ = [
    "Book",
    "Codebook",
    "Coded",
    "Exact",
    "ExplicitMask",
    "Grid",
    "LowRank",
    "Patches",
    "Placed",
    "Rotated",
    "Rotation",
    "SeededMask",
    "Term",
    "site_number",
]


def site_number(name: str) -> int:
    """32-bit number of a tensor name: the first four bytes, little-endian, of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
