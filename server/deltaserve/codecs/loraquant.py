"""LoRAQuant: singular directions in mixed precision, the strong ones in 2 or 3 bits, the rest in 1. arXiv 2510.26690,
after a secondary text; there for the product of a trained LoRA, here for Δ itself.

    Δ = U diag(σ) Vᵀ,   (U√σ)(√σVᵀ) cut at rank r;   h = min{h : Σ_{i≤h} σ_i ≥ coverage · Σ_{i≤r} σ_i}
    directions 1 … h    odd levels of `high_bits`
    directions h+1 … r  signs

√σ on both sides or σ between unit vectors is the same here: every direction has a step of its own, and σ and steps meet
in s. The paper rounds in groups of columns with a scale each, and refines the factors by gradients on data; neither is
here (ours: one scale a direction, data-free). estimator: see directions.py.

    bits/parameter = ((high_bits · h + r − h) (rows + cols) + 32 r) / (rows · cols)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.codecs.directions import low_rank, low_rank_bits
from deltaserve.codecs.linalg import svd
from deltaserve.codecs.uniform import normalised
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Term


@dataclass(frozen=True)
class LoRAQuant:
    needs_gram: ClassVar[bool] = False
    bits: float = 1.0  # per parameter, everything counted, > 0: the largest rank that fits, at least 1
    coverage: float = 0.9  # share of Σσ in `high_bits`, in 0 … 1
    high_bits: int = 2  # 2 or 3
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise CodecError(f"loraquant: bits {self.bits} is not > 0 and finite")
        if not 0 <= self.coverage <= 1:
            raise CodecError(f"loraquant: coverage {self.coverage} is not in 0 … 1")
        if self.high_bits not in (2, 3):
            raise CodecError(f"loraquant: high_bits {self.high_bits!r} is not 2 or 3")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"loraquant: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "loraquant"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:  # noqa: ARG002 (nothing is random here)
        unit, factor = normalised(delta)
        u, sigma, vt = svd(unit)
        rank, high = self._split(sigma, *delta.shape)
        spans = [(0, high, self.high_bits), (high, rank, 1)]
        return [
            low_rank(u[:, i:j], sigma[i:j] * factor, vt[i:j], bits, estimator=self.estimator)
            for i, j, bits in spans
            if i < j
        ]

    def _split(self, sigma: Tensor, rows: int, cols: int) -> tuple[int, int]:
        """(r, h) of the largest r that fits. r directions more never take fewer of them into the high ones."""
        total = sigma.cumsum(0)
        high = (total < self.coverage * total[:, None]).sum(1).add(self.coverage > 0).tolist()  # [r]: h for each r

        def fits(rank: int) -> bool:
            h = high[rank - 1]
            bits = low_rank_bits(rows, cols, h, self.high_bits) + low_rank_bits(rows, cols, rank - h, 1)
            return bits <= self.bits * rows * cols

        rank = 1
        while rank < len(sigma) and fits(rank + 1):
            rank += 1
        return rank, high[rank - 1]
