"""SliM-LLM: bits where they matter, by blocks of columns. arXiv 2405.14917, on Δ for W; after its released code.

    Δ̂[:, block] = step_(r, block) · level        b − 1, b or b + 1 bits by block, b in the mean

Bits (the paper's SBA): a block's salience is Σ w²/d², d = diag U, UᵀU = (H + damp)⁻¹. The i least salient blocks get
one bit less, the i most salient one more; i in 0 … blocks/2 by the least error of plain rounding. The paper's error is
the KL of softmax(x·Ŵᵀ); here tr(E·H·Eᵀ), with i = 0 tried too. A block of 0 bits is absent; a short last
block has b bits. Rounding: GPTQ by blocks, each with the columns as they are by then. Where H is not known, H = d = 1.

Step (SQC): the paper searches 0.9 … 1.1 of the extremes (101 points, 21 here) for the least Σ|e|^2.4, salient entries
weighted by λ = 1, that is alike; mean |w| at one bit; its grids have a zero point, here they are symmetric without a
zero. estimator "paper" does that; "unbiased" (ours) takes the least-squares step, and after the sweep scales every row
such that ⟨Δ, Δ̂⟩_H = ‖Δ‖²_H.

    bits/parameter = b + 16 · ceil(cols / block) / cols (+ 8 · ceil(blocks / 8) / (rows · cols) for each bit-width,
                     − 16 / cols for each absent block)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.codecs.linalg import Round, gptq, inverse_factor
from deltaserve.codecs.uniform import (
    fair_zeros,
    fitted_step,
    grid_of,
    inner,
    normalised,
    odd_codes,
    odd_levels,
    output_gain,
)
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, Placed, Term

MAX_BITS = 4
DAMP = 0.01
ERROR_POWER = 2.4
SEARCHED = torch.linspace(0.9, 1.1, 21)


@dataclass(frozen=True)
class Slim:
    needs_gram: ClassVar[bool] = True
    bits: int = 2  # b: mean bits of a code, 1 … 4
    block: int = 128  # columns that share a bit-width and, in a row, a step; 32 … 1024
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= MAX_BITS:
            raise CodecError(f"slim: bits {self.bits!r} is not in 1 … {MAX_BITS}")
        if not isinstance(self.block, int) or not 32 <= self.block <= 1024:
            raise CodecError(f"slim: block {self.block!r} is not in 32 … 1024")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"slim: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "slim"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        unit, factor = normalised(delta)
        values = fair_zeros(unit, site)
        widths = self._widths(values, site.gram)
        steps: list[Tensor] = []  # float32 [rows, 1] by block

        def fit(block: Tensor, start: int) -> Round:
            width = widths[start // self.block]
            step = self._step(block, width).bfloat16().float()
            steps.append(step)
            return lambda column, _: _rounded(column[:, None], step, width)[:, 0]

        decoded = gptq(values, site.gram, fit, group=self.block, damp=DAMP)
        gain = output_gain(unit, decoded, site.gram) if self.estimator == "unbiased" else torch.ones(len(unit), 1)
        return [
            self._term(decoded, steps, gain.double() * factor, widths, width) for width in sorted(set(widths) - {0})
        ]

    def _term(self, decoded: Tensor, steps: list[Tensor], unit: Tensor, widths: list[int], width: int) -> Term:
        """The blocks of one bit-width; `unit` float64 [rows, 1] is what the steps are in."""
        rows, cols = decoded.shape
        chosen = [number for number, other in enumerate(widths) if other == width]
        levels = [
            block / torch.where(steps[number] > 0, steps[number], 1) + (steps[number] == 0)
            for number, block in enumerate(torch.split(decoded, self.block, 1))
            if widths[number] == width
        ]
        coded = Coded(
            rows,
            sum(block.shape[1] for block in levels),
            width,
            grid_of(width),
            odd_codes(torch.cat(levels, 1), width),
            row=(torch.cat([steps[number] for number in chosen], 1) * unit).bfloat16(),
            group=self.block,
        )
        if len(chosen) == len(widths):
            return coded
        present = torch.tensor([other == width for other in widths], dtype=torch.uint8)
        return Placed(coded, cols, self.block, layout.pack(present, 1))

    def _widths(self, values: Tensor, gram: Tensor | None) -> list[int]:
        """Bits of each block."""
        blocks = torch.split(values, self.block, 1)
        whole = [number for number, block in enumerate(blocks) if block.shape[1] == self.block]
        spread = torch.ones(values.shape[1]) if gram is None else inverse_factor(gram, DAMP).diagonal()
        salience = [float(block.square().sum()) for block in torch.split(values / spread, self.block, 1)]
        order = sorted(whole, key=lambda number: salience[number])
        rounded = {
            width: [_rounded(block, self._step(block, width), width) for block in blocks]
            for width in (self.bits - 1, self.bits, self.bits + 1)
        }

        def shifted(count: int) -> list[int]:
            widths = [self.bits] * len(blocks)
            for number in order[:count]:
                widths[number] -= 1
            for number in order[len(order) - count :]:
                widths[number] += 1
            return widths

        def error(widths: list[int]) -> float:
            residual = values - torch.cat([rounded[width][number] for number, width in enumerate(widths)], 1)
            return float(inner(residual, residual, gram).sum())

        return min((shifted(count) for count in range(len(order) // 2 + 1)), key=error)

    def _step(self, block: Tensor, width: int) -> Tensor:
        """[rows, n] → [rows, 1]"""
        if width == 0:
            return torch.zeros(len(block), 1)
        if self.estimator == "unbiased" or width == 1:
            return fitted_step(block, width)
        peak: Tensor = block.abs().amax(1, keepdim=True) / (2**width - 1)
        errors = [(block - _rounded(block, peak * p, width)).abs().pow(ERROR_POWER).sum(1) for p in SEARCHED]
        best = torch.stack(errors).argmin(0)  # int64 [rows]
        return peak * SEARCHED.index_select(0, best)[:, None]


def _rounded(values: Tensor, step: Tensor, width: int) -> Tensor:
    """[rows, n], steps [rows, 1]"""
    return odd_levels(values, step, width) * step if width else torch.zeros_like(values)
