"""A term between orthonormal block transforms, which are applied to activations, never to weights.

    Δ̂ = T_outᵀ · term · T_in,    x·Δ̂ᵀ = ((x·T_inᵀ) · termᵀ) · T_out

hadamard   Sylvester's order, blocks of the largest powers of two that fit: `size` as long as it fits, then smaller ones
dct        DCT-II, blocks of `size`, the last one shorter
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from deltaserve_kernels.hadamard import walsh_matrix
from deltaserve_kernels.terms.packed import Packed

if TYPE_CHECKING:
    from deltaserve_kernels.terms import Term


@dataclass(frozen=True)
class Rotation:
    """An orthonormal transform of the last dimension; `size` a power of two for hadamard."""

    kind: Literal["hadamard", "dct"]
    size: int

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] → x·Tᵀ, the coefficients, in x's dtype."""
        return self._blockwise(x, transpose=True)

    def inverse(self, x: Tensor) -> Tensor:
        """x [..., n] → x·T."""
        return self._blockwise(x, transpose=False)

    def _blockwise(self, x: Tensor, *, transpose: bool) -> Tensor:
        whole, start, parts = x.shape[-1] // self.size, 0, []
        if whole:
            matrix = block_matrix(self.kind, self.size, x.dtype, str(x.device))
            block = x[..., : whole * self.size].reshape(*x.shape[:-1], whole, self.size)
            parts.append((block @ (matrix.T if transpose else matrix)).flatten(-2))
            start = whole * self.size
        while start < x.shape[-1]:
            rest = x.shape[-1] - start
            length = rest if self.kind == "dct" else 1 << rest.bit_length() - 1
            matrix = block_matrix(self.kind, length, x.dtype, str(x.device))
            parts.append(x[..., start : start + length] @ (matrix.T if transpose else matrix))
            start += length
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


@cache
def block_matrix(kind: str, size: int, dtype: torch.dtype, device: str) -> Tensor:
    """T, orthonormal [size, size]: row k is the k-th basis vector."""
    if kind == "hadamard":
        matrix = walsh_matrix(torch.arange(size), size).double()
        return (matrix / math.sqrt(size)).to(device=device, dtype=dtype)
    k, j = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * j + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Rotated(Packed):
    """`rows` and `cols` are the term's. None: identity."""

    term: Term
    t_in: Rotation | None = None
    t_out: Rotation | None = None

    @property
    def rows(self) -> int:
        return self.term.rows

    @property
    def cols(self) -> int:
        return self.term.cols

    def serving(self) -> Rotated:
        return Rotated(self.term.serving(), self.t_in, self.t_out)

    def decode(self) -> Tensor:
        """float32 [rows, cols]"""
        whole = self.term.decode()
        if self.t_in:
            whole = self.t_in.inverse(whole)
        return self.t_out.inverse(whole.T).T.contiguous() if self.t_out else whole
