"""DARE: drop most of Δ at random, rescale the rest. Yu et al., arXiv 2311.03099 (ICML 2024).

    Δ̂ = M ⊙ Δ / P(M = 1)        unbiased: E[Δ̂] = Δ

The paper draws M independently per entry. Here (ours) one entry survives in every group of G consecutive columns, its
place drawn by Philox from the seed: the same survival probability 1/G, a fixed number of survivors a row, no stored
mask, and every survivor's address computable on any device.

The paper keeps survivors in 16 bits. Ours: bfloat16 (16), integers −7…7 (4), ±1 ±3 (2, least-squares step) or the sign
alone (1), with a scale a row or a tensor such that ⟨v, v̂⟩ = ‖v‖². Zeros get drawn signs where the grid has none.

    bits/parameter = value_bits / G (+ 16 / columns or 32 / (rows · columns) for the scales below 16 bits)

rescale "darex-q" (Deng et al., arXiv 2410.09344, ICLR 2025): 1/q in place of 1/P, 1 ≤ 1/q ≤ 1/P, by the least change of
the output. The paper searches q, for a layer or the model, on the last layer's output; here each layer has its own, by
least squares on its own output: 1/q = ⟨M ⊙ Δ, Δ⟩_H / ‖M ⊙ Δ‖²_H. That shrinks Δ where little survives (to a tenth at
0.03 bits), and a fine-tune does not bear it: to be compared with, not to be used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Site
from deltaserve.codecs.uniform import (
    affordable,
    check_tile,
    fair_zeros,
    fitted_step,
    grid_of,
    inner,
    normalised,
    odd_codes,
    odd_levels,
    unbiased_step,
)
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, SeededMask, Term

MAX_GROUP = 4096
Scale = Literal["row", "tensor"]
Rescale = Literal["unbiased", "darex-q"]


@dataclass(frozen=True)
class Dare:
    group: int | None = None  # columns of which one survives, 1 … 4096: the drop rate is 1 − 1/group
    value_bits: int = 4  # 1, 2, 4 or 16
    bits: float | None = None  # in place of group: the smallest that meets these bits per parameter, scales included
    scale: Scale = "row"  # what one scale covers, below 16 bits
    rescale: Rescale = "unbiased"
    tile: int = 1  # rows that share their columns: 1 or 64

    def __post_init__(self) -> None:
        if self.value_bits not in (1, 2, 4, 16):
            raise CodecError(f"dare: value_bits {self.value_bits!r} is not 1, 2, 4 or 16")
        if (self.group is None) == (self.bits is None):
            raise CodecError("dare: exactly one of group, bits is needed")
        if self.group is not None and (not isinstance(self.group, int) or not 1 <= self.group <= MAX_GROUP):
            raise CodecError(f"dare: group {self.group!r} is not in 1 … {MAX_GROUP}")
        if self.bits is not None and not 0 < self.bits <= self.value_bits:
            raise CodecError(f"dare: bits {self.bits:g} is not in 0 … {self.value_bits}")
        if self.scale not in get_args(Scale):
            raise CodecError(f"dare: scale {self.scale!r} is not one of {get_args(Scale)}")
        if self.rescale not in get_args(Rescale):
            raise CodecError(f"dare: rescale {self.rescale!r} is not one of {get_args(Rescale)}")
        check_tile("dare", self.tile)

    @property
    def needs_gram(self) -> bool:
        return self.rescale == "darex-q"

    @property
    def name(self) -> str:
        return "dare"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        unit, factor = normalised(delta)
        mask = SeededMask(self._group(rows, cols), site.seed, site.number, tile=self.tile)
        columns = mask.columns(rows, cols)
        levels, scale = self._quantised(unit.gather(1, columns) * mask.inverse_rate(cols), site)
        if self.rescale == "darex-q":
            decoded = torch.zeros_like(unit).scatter_(1, columns, levels * scale)
            power = inner(decoded, decoded, site.gram).sum()
            gain = inner(decoded, unit, site.gram).sum() / power if power > 0 else torch.ones(())
            scale = scale * gain.clamp(1 / float(mask.inverse_rate(cols).max()), 1)
        scale = scale.double() * factor
        if self.value_bits == 16:
            return [Coded(rows, cols, 16, "float", (levels * scale).bfloat16(), mask=mask)]
        row = scale.float().reshape(()) if self.scale == "tensor" else scale.bfloat16()
        if self.value_bits == 4:
            codes = layout.pack((levels + 8).to(torch.uint8), 4)
            return [Coded(rows, cols, 4, "int", codes, row=row, mask=mask)]
        codes = odd_codes(levels, self.value_bits)
        return [Coded(rows, cols, self.value_bits, grid_of(self.value_bits), codes, row=row, mask=mask)]

    def _group(self, rows: int, cols: int) -> int:
        if self.bits is None:
            assert self.group is not None
            return self.group
        scales = 0.0 if self.value_bits == 16 else 16 if self.scale == "row" else 32 / rows
        return math.ceil(cols / affordable(self.bits * cols - scales, self.value_bits, cols))

    def _quantised(self, survivors: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """float32 [rows, groups] → levels of the same shape; scales [rows, 1] or [1, 1]."""
        if self.value_bits == 16:
            return survivors, torch.ones(1, 1)
        values = survivors if self.scale == "row" else survivors.reshape(1, -1)
        if self.value_bits == 4:
            peak = values.abs().amax(1, keepdim=True)
            levels = (values / torch.where(peak > 0, peak, 1) * 7).round()  # −7 … 7
        else:
            values = fair_zeros(values, site)
            levels = odd_levels(values, fitted_step(values, self.value_bits), self.value_bits)
        return levels.view_as(survivors), unbiased_step(values, levels)
