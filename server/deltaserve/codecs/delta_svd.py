"""Delta-SVD: the leading singular directions of Δ.

    Δ = U diag(σ) Vᵀ,   Δ̂ = U_r diag(σ_r) V_rᵀ          optimal in ‖·‖_F for its rank (Eckart–Young)

The rank is fixed, or the smallest with Σ_{i≤r} σ_i² ≥ energy · ‖Δ‖². Factors in bfloat16, σ in float32. After the
abstract of Delta-SVD (its threshold rule is not public); computed from the eigenvectors of the smaller Gram matrix in
float64, so singular values under about 1e-7 of the largest are lost.

    bits/parameter = 16 r (rows + cols) / (rows · cols) + 32 r / (rows · cols)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaserve.codecs.base import Site
from deltaserve.codecs.directions import largest_rank, whole_low_rank
from deltaserve.codecs.linalg import svd
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Term


@dataclass(frozen=True)
class DeltaSvd:
    needs_gram: ClassVar[bool] = False
    rank: int | None = None  # ≥ 1; cut to the rank of the matrix
    energy: float | None = None  # share of ‖Δ‖² kept, in (0, 1]
    bits: float | None = None  # bits per parameter, > 0: the largest rank that fits, at least 1

    def __post_init__(self) -> None:
        if sum(option is not None for option in (self.rank, self.energy, self.bits)) != 1:
            raise CodecError("delta-svd: exactly one of rank, energy, bits is needed")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise CodecError(f"delta-svd: rank {self.rank!r} is not a whole number ≥ 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise CodecError(f"delta-svd: energy {self.energy} is not in (0, 1]")
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise CodecError(f"delta-svd: bits {self.bits} is not > 0 and finite")

    @property
    def name(self) -> str:
        return "delta-svd"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:  # noqa: ARG002 (nothing is random here)
        rows, cols = delta.shape
        u, sigma, vt = svd(delta)
        rank = self._rank(sigma.square(), rows, cols)
        return [whole_low_rank(u[:, :rank], sigma[:rank], vt[:rank])]

    def _rank(self, power: Tensor, rows: int, cols: int) -> int:
        if self.rank is not None:
            return self.rank
        if self.bits is not None:
            return largest_rank(self.bits * rows * cols, rows, cols)
        assert self.energy is not None
        shares = power.cumsum(0) / power.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return min(int((shares < self.energy).sum()) + 1, len(power))
