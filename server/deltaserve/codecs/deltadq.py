"""DeltaDQ: drop within groups of columns, then few bits a survivor. arXiv 2410.08666; after its abstract and what is
said of it elsewhere: the paper's ladder and its scores are not public, and there is no code.

    Δ̂ = Q(M ⊙ Δ / P(M = 1))        M keeps exactly `keep` of every `group` columns of a row

Drop: the share P of survivors is fixed by the budget, the size of the group is chosen: from one survivor in the
smallest group to all of a row's survivors in one group, `keep` doubling. The paper takes the size with the least error
of attention outputs on a few inputs; here the least tr(E·H·Eᵀ) on the first rows, E = Δ − M ⊙ Δ / P, and where H is not
known that of the row sums, H = 1·1ᵀ (under H = 1 every size has the same expected error). Masks are seeds, not stored.

Quantisation: k bits uniform over the tensor, one scale. The paper then splits the codes by range into m parts of
k − log₂ m bits, each a sparse matrix of its own: the saved bits move into its indices, which the paper's ratio does not
count. Here k-bit codes are stored. Its grid has a zero point, ours is symmetric (no zero). estimator "unbiased" (ours):
least-squares step, then ⟨v, v̂⟩ = ‖v‖²; "paper": the step of the extremes.

    bits/parameter = k · keep / group + 32 / (rows · cols)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
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
from deltaserve_kernels.terms import Coded, SeededMask, Term

MAX_VALUE_BITS = 5
TRIED_ROWS = 128  # on which group sizes are compared


@dataclass(frozen=True)
class DeltaDQ:
    needs_gram: ClassVar[bool] = True
    bits: float = 0.5  # per parameter, the scale included; in 0 … value_bits. A row has 8 bits at least
    value_bits: int = 4  # k, 1 … 5
    estimator: Estimator = "unbiased"
    tile: int = 1  # rows that share their columns: 1 or 64

    def __post_init__(self) -> None:
        if not isinstance(self.value_bits, int) or not 1 <= self.value_bits <= MAX_VALUE_BITS:
            raise CodecError(f"deltadq: value_bits {self.value_bits!r} is not in 1 … {MAX_VALUE_BITS}")
        if not 0 < self.bits <= self.value_bits:
            raise CodecError(f"deltadq: bits {self.bits:g} is not in 0 … {self.value_bits}")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"deltadq: estimator {self.estimator!r} is not one of {get_args(Estimator)}")
        check_tile("deltadq", self.tile)

    @property
    def name(self) -> str:
        return "deltadq"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        unit, factor = normalised(delta)
        mask = self._mask(unit, site)
        survivors = unit.gather(1, mask.columns(rows, cols)) * mask.inverse_rate(cols)
        values = fair_zeros(survivors.view(1, -1), site)
        if self.estimator == "paper":
            step = values.abs().amax().view(1, 1) / (2**self.value_bits - 1)
            levels = odd_levels(values, step, self.value_bits)
        else:
            levels = odd_levels(values, fitted_step(values, self.value_bits), self.value_bits)
            step = unbiased_step(values, levels)
        return [
            Coded(
                rows,
                cols,
                self.value_bits,
                grid_of(self.value_bits),
                odd_codes(levels.view_as(survivors), self.value_bits),
                row=(step.double() * factor).float().reshape(()),
                mask=mask,
            )
        ]

    def _mask(self, unit: Tensor, site: Site) -> SeededMask:
        rows, cols = unit.shape
        survivors = affordable(self.bits * cols - 32 / rows, self.value_bits, cols)
        masks = []
        keep = 1
        while keep <= survivors:
            group = math.ceil(cols / (survivors // keep))
            masks.append(SeededMask(group, site.seed, site.number, keep=keep, tile=self.tile))
            keep *= 2
        return min(masks, key=lambda mask: _output_error(unit[:TRIED_ROWS], mask, site.gram))


def _output_error(unit: Tensor, mask: SeededMask, gram: Tensor | None) -> float:
    columns = mask.columns(*unit.shape)
    kept = unit.gather(1, columns) * mask.inverse_rate(unit.shape[1])
    error = unit - torch.zeros_like(unit).scatter_(1, columns, kept)
    return float(error.sum(1).square().sum() if gram is None else inner(error, error, gram).sum())
