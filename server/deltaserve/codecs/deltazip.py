"""DeltaZip (ΔCompress): two of four columns survive, in few bits, by second-order pruning. arXiv 2312.05215 (EuroSys
2025); after its released code, which is SparseGPT (arXiv 2301.00774) on Δ.

    Δ̂ = M ⊙ (step_r · level)        M: 2 of every 4 columns, explicit;  b bits;  one step a row

The sweep of GPTQ, H = E[xᵀx] + damp: at every fourth column each row drops the two entries of least w²/d² as they are
by then, d = diag U, UᵀU = H⁻¹; what dropping and rounding leave is moved onto the columns to come. Where H is not
known the two largest survive and are rounded. The step is least squares for the two largest of four in Δ, set before
the sweep; the paper's grid is −2^(b−1) … 2^(b−1) − 1 with a step from the extremes, here (ours) ±1, ±3, …: the mask
says the zeros. estimator "unbiased" (ours): after the sweep the row's step is such that ⟨Δ, Δ̂⟩_H = ‖Δ‖²_H; "paper": it
stays.
Not here: layers calibrated on the compressed layers before them (H is the fine-tune's); GDeflate.

    bits/parameter = b/2 + 1 + 16/cols
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.codecs.linalg import Round, gptq, inverse_factor
from deltaserve.codecs.uniform import fitted_step, normalised, odd_codes, odd_levels, output_gain
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, ExplicitMask, Term

GROUP, KEEP, PLACE_BITS = 4, 2, 2
DAMP = 0.01


@dataclass(frozen=True)
class DeltaZip:
    needs_gram: ClassVar[bool] = True
    value_bits: int = 2  # b: 2 or 4
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if self.value_bits not in (2, 4):
            raise CodecError(f"deltazip: value_bits {self.value_bits!r} is not 2 or 4")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"deltazip: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "deltazip"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        unit, factor = normalised(delta)
        step = fitted_step(_largest(unit), self.value_bits).bfloat16().float()  # [rows, 1]
        places: list[Tensor] = []  # int64 [rows, 2] for each four columns
        spread = torch.ones(cols) if site.gram is None else inverse_factor(site.gram, DAMP).diagonal()

        def fit(block: Tensor, start: int) -> Round:
            salience = (block / spread[start : start + block.shape[1]]).abs()
            place = salience.topk(min(KEEP, block.shape[1]), dim=1).indices.sort(1).values
            survives = torch.zeros_like(block).scatter_(1, place, 1)
            places.append(place)
            return lambda column, j: (
                odd_levels(column[:, None], step, self.value_bits)[:, 0] * step[:, 0] * survives[:, j - start]
            )

        decoded = gptq(unit, site.gram, fit, group=GROUP, damp=DAMP)
        mask = ExplicitMask(GROUP, layout.pack(torch.cat(places, 1).to(torch.uint8), PLACE_BITS), keep=KEEP)
        survivors = decoded.gather(1, mask.columns(rows, cols))
        levels = survivors / torch.where(step > 0, step, 1) + (step == 0)
        if self.estimator == "unbiased":
            step = step * output_gain(unit, decoded, site.gram)
        row = (step.double() * factor).bfloat16()
        return [Coded(rows, cols, self.value_bits, "odd", odd_codes(levels, self.value_bits), row=row, mask=mask)]


def _largest(unit: Tensor) -> Tensor:
    """[rows, survivors]: the two largest of every four columns, zeros where there are fewer."""
    groups = torch.nn.functional.pad(unit, (0, -unit.shape[1] % GROUP)).view(len(unit), -1, GROUP)
    largest: Tensor = groups.gather(2, groups.abs().topk(KEEP, dim=2).indices)
    return largest.flatten(1)
