"""UltraDelta: a few bits a value, most of them dropped, layer by layer and class by class. arXiv 2505.13563 (NeurIPS
2025); after its released code (vision models; language models are not in it).

    class   k = round((Δ − min Δ) / (max Δ − min Δ) · 15)              4 bits, uniform over the tensor
    Δ̂       = M ⊙ table[k],   table[k] = γ · c · v_k · n_k / m_k       n_k entries of the class, m_k survivors

Drop (the paper's DAC): it drops the same share of every class, so that each keeps its mass. Such a mask has to be
stored, here (ours) one column of every group survives by the seed, and what the draw has made of a class is put right
in the table: Σ Δ̂ over a class is c · γ · n_k · v_k exactly, whatever survived. A class with no survivor is lost.
Values: estimator "unbiased" (ours) has v_k the mean of the class and c = ‖Δ‖² / Σ n_k v_k² over classes with survivors;
"paper" has the grid point min Δ + k · (max Δ − min Δ) / 15 and c = 1. Values in the table need no zero point.

Sparsity (MSA) s = 1 − bits/4: of the layers in order of their standard deviation, in thirds of the parameters, the
first has s + step, the second s, the third what makes the mean s; step is at most (1 − s)/3 (ours: the paper's own
setting, 0.01 at s = 0.97, goes that far). The paper rescales every layer by the mean s; here each by its own.

Norm (TNGR): γ = r / t in 0.5 … 1, t the trace norm Σ‖Δ̂‖_* of the dropped delta. The paper's r is the smallest t of
the tasks at hand; one tenant has none to look at, so `reference` is a number to keep: r as a share of the base's trace
norm. What a drop leaves is noise of full rank, so ‖Δ̂‖_* is taken as ‖Δ‖ √(rows ∧ cols) / √(1 − s). None: γ = 1.

    bits/parameter = 4 (1 − s) + 512 / (rows · cols)       masks cost nothing. The paper: 4 (1 − s) + H₂(s), on disk
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Codec, Estimator, LayerStats, Site
from deltaserve.codecs.uniform import affordable, check_tile, normalised
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, SeededMask, Term

VALUE_BITS = 4
CLASSES = 2**VALUE_BITS
TABLE_BITS = 32 * CLASSES


@dataclass(frozen=True)
class UltraDelta:
    needs_gram: ClassVar[bool] = False
    needs_sensitivity: ClassVar[bool] = False
    bits: float = 0.125  # per parameter, the table included; in 0 … 4. A row has 8 bits at least
    step: float = 0.01  # of sparsity between the thirds, in 0 … 1
    estimator: Estimator = "unbiased"
    reference: float | None = None  # trace norm of the delta whose γ is 1, as a share of the base's; > 0
    gamma: float = 1.0  # in 0 … 1; `plan` sets it where there is a reference
    tile: int = 1  # rows that share their columns: 1 or 64

    def __post_init__(self) -> None:
        if not 0 < self.bits <= VALUE_BITS:
            raise CodecError(f"ultradelta: bits {self.bits:g} is not in 0 … {VALUE_BITS}")
        if not 0 <= self.step < 1:
            raise CodecError(f"ultradelta: step {self.step} is not in 0 … 1")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"ultradelta: estimator {self.estimator!r} is not one of {get_args(Estimator)}")
        if self.reference is not None and not 0 < self.reference < math.inf:
            raise CodecError(f"ultradelta: reference {self.reference} is not > 0 and finite")
        if not 0 < self.gamma <= 1:
            raise CodecError(f"ultradelta: gamma {self.gamma} is not in 0 … 1")
        check_tile("ultradelta", self.tile)

    @property
    def name(self) -> str:
        return "ultradelta"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def plan(self, layers: Sequence[LayerStats]) -> Mapping[str, Codec]:
        """Bits by variance; γ of the whole delta."""
        total = sum(layer.parameters for layer in layers)
        step = VALUE_BITS * min(self.step, self.bits / VALUE_BITS / 3)  # in bits
        thirds: tuple[list[LayerStats], ...] = ([], [], [])
        seen = 0
        for layer in sorted(layers, key=lambda layer: (layer.std, layer.name)):
            thirds[3 * seen // total].append(layer)
            seen += layer.parameters
        low, _, high = (sum(layer.parameters for layer in third) for third in thirds)
        shares = (-step, 0.0, step * low / max(high, 1))  # the mean stays
        gamma = self._gamma(layers)
        return {
            layer.name: replace(self, bits=min(self.bits + share, VALUE_BITS), gamma=gamma)
            for third, share in zip(thirds, shares, strict=True)
            for layer in third
        }

    def _gamma(self, layers: Sequence[LayerStats]) -> float:
        if self.reference is None:
            return self.gamma
        widths = [math.sqrt(min(layer.rows, layer.cols)) for layer in layers]
        base = sum(layer.base_norm * width for layer, width in zip(layers, widths, strict=True))
        kept = self.bits / VALUE_BITS
        delta = sum(layer.norm * width for layer, width in zip(layers, widths, strict=True)) / math.sqrt(kept)
        return min(1.0, max(0.5, self.reference * base / delta)) if delta else 1.0

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        unit, factor = normalised(delta)
        survivors = affordable(self.bits * cols - TABLE_BITS / rows, VALUE_BITS, cols)
        mask = SeededMask(math.ceil(cols / survivors), site.seed, site.number, tile=self.tile)
        low, high = unit.min(), unit.max()
        classes = ((unit - low) / (high - low if high > low else 1) * (CLASSES - 1)).round().long()
        kept = classes.gather(1, mask.columns(rows, cols))
        table = self._table(unit, classes, kept).double() * (self.gamma * factor)
        codes = layout.pack(kept.to(torch.uint8), VALUE_BITS)
        return [Coded(rows, cols, VALUE_BITS, "table", codes, mask=mask, table=table.float())]

    def _table(self, unit: Tensor, classes: Tensor, kept: Tensor) -> Tensor:
        """c · v_k · n_k / m_k, float64 [16]; 0 where nothing of the class survives."""
        number = torch.bincount(classes.flatten(), minlength=CLASSES).double()
        left = torch.bincount(kept.flatten(), minlength=CLASSES)
        if self.estimator == "paper":
            grid = torch.linspace(float(unit.min()), float(unit.max()), CLASSES, dtype=torch.float64)
            mass = grid * number
        else:
            wide = unit.flatten().double()
            mass = torch.zeros(CLASSES, dtype=torch.float64).index_add_(0, classes.flatten(), wide)
            coded = (mass.square() / number.clamp(min=1))[left > 0].sum()
            mass *= wide.square().sum() / coded if coded > 0 else 1
        return torch.where(left > 0, mass / left.clamp(min=1), 0)
