"""BitDelta: one bit a weight. Liu et al., arXiv 2402.10193 (NeurIPS 2024); per axis: arXiv 2512.19720.

    Δ̂ = α · sign(Δ)        α one number, one per row, or one per column

    estimator "paper"      α = mean |Δ|                 least squares; keeps only Σ|Δ|·mean|Δ| of ‖Δ‖² along Δ
    estimator "unbiased"   α = Σ Δ² / Σ |Δ|             ours: ⟨Δ, Δ̂⟩ = ‖Δ‖², what a fine-tune needs (README, figures)

The sign of an exact zero is +1 in the released code; under "unbiased" it is drawn from the seed, so that zeros (up to a
tenth of a bf16 Δ) add no common direction. Not here: distillation of α on logits (paper §3.2).

    bits/parameter = 1 (+ 32 / (rows · cols), 16 / cols or 16 / rows for α per tensor, row or column)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.philox import random_words
from deltaserve_kernels.terms import Coded, Term

Axis = Literal["tensor", "row", "col"]


@dataclass(frozen=True)
class BitDelta:
    needs_gram: ClassVar[bool] = False
    scale: Axis = "tensor"  # what one α covers
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if self.scale not in get_args(Axis):
            raise CodecError(f"bitdelta: scale {self.scale!r} is not one of {get_args(Axis)}")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"bitdelta: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "bitdelta"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        positive = delta > 0
        zero = delta == 0
        if self.estimator == "paper":
            positive = positive | zero
        elif bool(zero.any()):
            positive = positive | (zero & (random_words(site.seed, site.number, rows, cols, stream=1) & 1).bool())
        alpha = self._alpha(delta)
        return [
            Coded(
                rows=rows,
                cols=cols,
                bits=1,
                grid="sign",
                codes=layout.pack(positive.to(torch.uint8), 1),
                row=None if self.scale == "col" else alpha,
                col=alpha if self.scale == "col" else None,
            )
        ]

    def _alpha(self, delta: Tensor) -> Tensor:
        """float32 [] · bfloat16 [rows, 1] · bfloat16 [cols]"""
        axis = {"tensor": (0, 1), "row": (1,), "col": (0,)}[self.scale]
        if self.estimator == "paper":
            alpha = delta.abs().mean(axis, keepdim=True)
        else:
            exact = delta.abs().double()  # squares of float32 overflow above 1e19 and vanish below 1e-23
            total = exact.sum(axis, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            alpha = (exact.square().sum(axis, keepdim=True) / total).float()
        if self.scale == "tensor":
            return alpha.reshape(())
        return alpha.bfloat16() if self.scale == "row" else alpha.flatten().bfloat16()
