"""DARE: drop most of Δ at random, rescale the rest. Yu et al., arXiv 2311.03099 (ICML 2024).

    Δ̂ = M ⊙ Δ / P(M = 1)        unbiased: E[Δ̂] = Δ

The paper draws M independently per entry. Here (ours) one entry survives in every group of G consecutive columns, its
place drawn by Philox from the seed: the same survival probability 1/G, a fixed number of survivors a row, no stored
mask, and every survivor's address computable on any device. Survivors are kept in 16 bits (bfloat16) or 4 (integers
−7…7, one scale a row, the scale corrected so that ⟨v, v̂⟩ = ‖v‖²).

    bits/parameter = value_bits / G (+ 16 / columns for the scales of 4-bit rows)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltaserve.codecs.base import Site
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, SeededMask, Term

MAX_GROUP = 4096


@dataclass(frozen=True)
class Dare:
    group: int = 8  # columns of which one survives, 1 … 4096: the drop rate is 1 − 1/group
    value_bits: int = 4  # 4 or 16

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or not 1 <= self.group <= MAX_GROUP:
            raise CodecError(f"dare: group {self.group!r} is not in 1 … {MAX_GROUP}")
        if self.value_bits not in (4, 16):
            raise CodecError(f"dare: value_bits {self.value_bits!r} is not 4 or 16")

    @property
    def name(self) -> str:
        return "dare"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        mask = SeededMask(self.group, site.seed, site.number)
        survivors = delta.gather(1, mask.columns(rows, cols)) * mask.group_sizes(cols)  # [rows, groups]
        if self.value_bits == 16:
            return [Coded(rows, cols, 16, "float", survivors.bfloat16(), mask=mask)]
        peak = survivors.abs().amax(1, keepdim=True)
        unit = survivors / torch.where(peak > 0, peak, 1) * 7  # −7 … 7: its squares neither overflow nor vanish
        levels = unit.round()
        # the divisor is at least 49, but in a row of zeros
        gain = peak / 7 * (unit.square().sum(1, keepdim=True) / (unit * levels).sum(1, keepdim=True).clamp(min=1))
        return [
            Coded(rows, cols, 4, "int", layout.pack((levels + 8).to(torch.uint8), 4), row=gain.bfloat16(), mask=mask)
        ]
