"""LoRA-SVD: Δ as the low-rank adapter that stands nearest to it where the inputs are.

    B [rows, r], A [r, cols] of least E‖(Δ − BA)·x‖² = tr((Δ − BA)·H·(Δ − BA)ᵀ),   H = E[xᵀx] + 0.01 · mean diagonal · 1
    H = L·Lᵀ,   Δ·L = U diag(σ) Vᵀ,   B·A = U_r U_rᵀ Δ        (Eckart–Young in the metric of H; L is not inverted)

    B = U_r diag(√τ),   A = diag(1/√τ) U_rᵀ Δ,   τ_k = ‖u_kᵀΔ‖

Without calibration H = 1: the plain SVD of delta-svd, B = U_r√σ_r, A = √σ_r V_rᵀ. The factors are those of a LoRA in
bfloat16, α/r = 1 (s is all ones): PEFT's lora_B and lora_A as they are. Ours; a LoRA by SVD is common practice.

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
from deltaserve.codecs.linalg import lower_factor, svd
from deltaserve.codecs.uniform import normalised
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Term

DAMP = 0.01


@dataclass(frozen=True)
class LoraSvd:
    needs_gram: ClassVar[bool] = True
    rank: int | None = None  # ≥ 1; cut to the rank of the matrix
    bits: float | None = None  # bits per parameter, > 0: the largest rank that fits, at least 1

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.bits is None):
            raise CodecError("lora-svd: exactly one of rank, bits is needed")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise CodecError(f"lora-svd: rank {self.rank!r} is not a whole number ≥ 1")
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise CodecError(f"lora-svd: bits {self.bits} is not > 0 and finite")

    @property
    def name(self) -> str:
        return "lora-svd"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        unit, factor = normalised(delta)
        wide = unit.double()
        u = svd(wide if site.gram is None else wide @ lower_factor(site.gram, DAMP)).u
        rank = self.rank or largest_rank((self.bits or 0) * rows * cols, rows, cols)
        u = u[:, :rank]
        projected = u.T @ wide  # float64 [r, cols]
        root = projected.norm(dim=1).sqrt()  # [r] √τ
        half = 2.0 ** (math.frexp(factor)[1] // 2)  # a power of two: roundings do not depend on Δ's unit
        left, right = u * (root * half), projected * (factor / half / torch.where(root > 0, root, 1))[:, None]
        return [whole_low_rank(left, torch.ones(len(root)), right)]
