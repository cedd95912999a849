"""Walsh–Hadamard transforms in Sylvester's order, not normalised: H[i, j] = (−1)^popcount(i & j)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 64  # of one product


def walsh_matrix(rows: Tensor, size: int) -> Tensor:
    """float32 [len(rows), size]: those rows, int64 ≥ 0, of H."""
    parity = rows[:, None] & torch.arange(size, device=rows.device)
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return 1.0 - 2.0 * (parity & 1)


@cache
def _whole_matrix(size: int, dtype: torch.dtype, device: str) -> Tensor:
    return walsh_matrix(torch.arange(size, device=device), size).to(dtype)


def walsh_hadamard(x: Tensor) -> Tensor:
    """x [..., n], n a power of two → x · H in x's dtype, by factors of at most `BLOCK`: H of a·b is H_a ⊗ H_b."""
    size = x.shape[-1]
    block = min(size, BLOCK)
    matrix = _whole_matrix(block, x.dtype, str(x.device))
    y: Tensor = x.reshape(*x.shape[:-1], size // block, block) @ matrix
    if size > block:
        y = walsh_hadamard(y.mT).mT
    return y.flatten(-2)
