"""D-QReLO: the signs of Δ, then the leading singular directions of what they leave. arXiv 2604.16940 (Findings of ACL
2026), after a full summary of it; no code is public.

    Δ̂₁ = α sign(Δ),   R = Δ − Δ̂₁ = U diag(σ) Vᵀ,   Δ̂ = Δ̂₁ + U_r diag(σ_r) V_rᵀ

The paper: ratio ρ = 1/16 + ρ₁ of 16-bit size, r = ⌈rows · cols · ρ₁ / (rows + cols)⌉, factors of 16 bits. Here the bits
beyond the signs' are a ceiling, so r is rounded down, and factors may have fewer bits (ours): more directions for the
same size. Its pruning of vectors is not here: norms and biases travel as they are.

    estimator "paper"      α = mean |Δ|             least squares
    estimator "unbiased"   α = Σ Δ² / Σ |Δ|         ours: ⟨Δ, Δ̂₁⟩ = ‖Δ‖²; zeros get a drawn sign in both

    bits/parameter = 1 + 32 / (rows · cols) + factor_bits · r (rows + cols) / (rows · cols) + 32 r / (rows · cols)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.codecs.directions import FACTOR_BITS, largest_rank, low_rank
from deltaserve.codecs.linalg import svd
from deltaserve.codecs.uniform import fair_zeros, normalised
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, Term


@dataclass(frozen=True)
class DQReLO:
    needs_gram: ClassVar[bool] = False
    bits: float = 2.0  # per parameter, everything counted, in 0 … 32; the signs and one direction at least
    factor_bits: int = 16  # of an entry of U and V: 1, 2, 3, 4, 5, 8, 16
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 32:
            raise CodecError(f"dqrelo: bits {self.bits:g} is not in 0 … 32")
        if self.factor_bits not in FACTOR_BITS:
            raise CodecError(f"dqrelo: factor_bits {self.factor_bits!r} is not one of {FACTOR_BITS}")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"dqrelo: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "dqrelo"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        unit, factor = normalised(delta)
        positive = fair_zeros(unit.reshape(1, -1), site).view(rows, cols) > 0
        magnitude = unit.abs().double()
        if self.estimator == "paper":
            alpha = magnitude.mean()
        else:
            alpha = magnitude.square().sum() / magnitude.sum().clamp(min=torch.finfo(torch.float64).tiny)
        signs = Coded(rows, cols, 1, "sign", layout.pack(positive.to(torch.uint8), 1), row=(alpha * factor).float())
        u, sigma, vt = svd((unit - torch.where(positive, alpha, -alpha)).float())
        rank = largest_rank(self.bits * rows * cols - 8 * signs.nbytes, rows, cols, self.factor_bits)
        return [signs, low_rank(u[:, :rank], sigma[:rank] * factor, vt[:rank], self.factor_bits)]
