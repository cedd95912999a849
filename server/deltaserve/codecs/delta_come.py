"""Delta-CoMe: singular directions at fewer and fewer bits. Ping et al., arXiv 2406.08903 (NeurIPS 2024).

    Δ̂ = Σ_b Û_b · diag(s_b) · V̂_b       ranks by falling σ: 8 bits, 3 bits, 2 bits, the rest dropped

After the released code: GPTQ (percdamp 0.01) of V under H, then of U under A·H·Aᵀ, A = diag(σ)·V̂_b, each group of bits
by itself. For 4096 × 4096 it keeps 2, 32 and 968 ranks (1.08 bits with scales and zero points, not 1/16). Here the
groups have these shares of as many ranks as `bits` pays for, the first two rounded up: of 70 ranks, 1, 3 and 66.

Departures: symmetric odd levels where the paper has a zero point; columns in their order (no act-order); H of the
fine-tune's own inputs for all groups. Steps: the paper reaches to the extremes of every 128 entries (`scale` "peak",
`step_group` 128); here least squares, one a rank, which is part of s and free. estimator "unbiased" is ours.

    bits/parameter = Σ over b of b · r_b · (rows + cols) / (rows · cols) + 32 · r / (rows · cols), rows of U in whole
    bytes (+ 16 · (rows · ⌈r_b / g⌉ + r_b · ⌈cols / g⌉) / (rows · cols) with groups of g)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.codecs.linalg import svd
from deltaserve.codecs.rank_factors import (
    Scale,
    low_rank_terms,
    quantise_left,
    quantise_rows,
)
from deltaserve.codecs.rank_moments import Moments
from deltaserve.codecs.rank_widths import paper_widths
from deltaserve.codecs.uniform import normalised
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Term


@dataclass(frozen=True)
class DeltaCome:
    needs_gram: ClassVar[bool] = True
    bits: float = 1.0  # ceiling on bits per parameter, > 0; at least one rank is kept
    step_group: int | None = None  # entries of a row that share a step, 8 … 4096; None: one step a rank
    scale: Scale = "least-squares"
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise CodecError(f"delta-come: bits {self.bits} is not > 0 and finite")
        if self.step_group is not None and (not isinstance(self.step_group, int) or not 8 <= self.step_group <= 4096):
            raise CodecError(f"delta-come: step_group {self.step_group!r} is not in 8 … 4096")
        if self.scale not in get_args(Scale):
            raise CodecError(f"delta-come: scale {self.scale!r} is not one of {get_args(Scale)}")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"delta-come: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "delta-come"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        scaled, unit = normalised(delta)
        u, sigma, vt = svd(scaled)
        widths = paper_widths(delta.shape, len(sigma), self.bits, self.step_group)
        u, sigma, vt = u[:, : len(widths)], sigma[: len(widths)], vt[: len(widths)]
        v = quantise_rows(vt.float(), widths, site.gram, self.scale, self.step_group)
        moments = Moments.of(scaled, sigma[:, None] * v.values(), site.gram)
        pieces = quantise_left(u.float(), widths, widths, moments, self.scale, self.step_group)
        return low_rank_terms(sigma, pieces, v, moments, self.estimator, unit)
