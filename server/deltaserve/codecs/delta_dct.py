"""Delta-DCT: square patches, a 2-D DCT of each, bits by importance. Huang et al., arXiv 2503.06676.

    Δ̂ = Tᵀ · patches · T        T: DCT-II of p columns (rows) at a time; patch = scale · (±1, ±3, …, ±(2^b − 1))

The importance of a patch is its norm; it decides its bits, 0 among them.

    split "2-0", "2-1-0"     the paper's kind: 2 bits (and 1) for equal shares of the most important patches, 0 for
                             the rest; how large the shares are is the budget's
    split "even"             ours: as even as the budget allows, b + 1 bits for the most important, b for the rest. A
                             patch of 0 bits is a lost direction, which costs a fine-tune more than noise does
    rescale                  ours: scales times ‖Δ‖² / Σ ‖kept patch‖², in place of the patches of 0 bits
    estimator "unbiased"     ours: steps for a normal source, scale = ‖patch‖² / ⟨patch, levels⟩
    estimator "paper"        from − max to max of a patch. The paper's codes have a zero point, the format has none

After the abstract of Delta-DCT: its patch size, split and rounding are not public.

    bits/parameter = Σ_b share_b · (b + 16/p²) + one bit a patch for each b in use, of p² parameters
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.codecs.uniform import GAUSSIAN_STEP, normalised, odd_codes, odd_levels, unbiased_step
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Patches, Rotated, Rotation, Term

Split = Literal["even", "2-0", "2-1-0"]
SHARED = {"2-0": (2,), "2-1-0": (2, 1)}  # widths of equal shares
MAX_WIDTH = 8


@dataclass(frozen=True)
class DeltaDct:
    needs_gram: ClassVar[bool] = False
    bits: float = 1.0  # ceiling on bits per parameter, everything counted, in 0 … 16; one patch at least
    patch: int = 16  # 8, 16 or 32: p
    split: Split = "even"
    rescale: bool = True
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 16:
            raise CodecError(f"delta-dct: bits {self.bits:g} is not in 0 … 16")
        if self.patch not in (8, 16, 32):
            raise CodecError(f"delta-dct: patch {self.patch!r} is not 8, 16 or 32")
        if self.split not in get_args(Split):
            raise CodecError(f"delta-dct: split {self.split!r} is not one of {get_args(Split)}")
        if not isinstance(self.rescale, bool):
            raise CodecError(f"delta-dct: rescale {self.rescale!r} is not true or false")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"delta-dct: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "delta-dct"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:  # noqa: ARG002 (nothing is random here)
        rows, cols = delta.shape
        rotation = Rotation("dct", self.patch)
        unit, factor = normalised(delta)
        patches = _cut(rotation.forward(rotation.forward(unit).T).T, self.patch)  # [n, p²]
        power = patches.square().sum(1)
        widths = self._widths(power, rows * cols)
        kept = power[widths > 0].double().sum()
        gain = factor * (power.double().sum() / kept if self.rescale and kept > 0 else 1)
        terms: list[Term] = []
        for bits in range(1, MAX_WIDTH + 1):
            if not bool((chosen := widths == bits).any()):
                continue
            codes, scale = self._coded(patches[chosen], bits)
            present = layout.pack(chosen.to(torch.uint8), 1)
            coded = Patches(rows, cols, self.patch, bits, codes, (scale.double() * gain).bfloat16(), present)
            terms.append(Rotated(coded, rotation, rotation))
        return terms

    def _coded(self, patches: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """float32 [n, p²] → packed codes, scales float32 [n]"""
        if self.estimator == "paper":
            step = patches.abs().amax(1, keepdim=True) / (2**bits - 1)
        else:
            inside = (patches != 0).sum(1, keepdim=True).clamp(min=1)  # what hangs over the edge is zero
            step = (patches.square().sum(1, keepdim=True) / inside).sqrt() * GAUSSIAN_STEP[bits]
        levels = odd_levels(patches, step, bits)
        scale = step if self.estimator == "paper" else unbiased_step(patches, levels)
        return odd_codes(levels, bits), scale.flatten()

    def _widths(self, power: Tensor, parameters: int) -> Tensor:
        """int64 [n]: bits of each patch. A matrix too small for its budget keeps one patch of each width."""
        order = power.argsort(descending=True, stable=True)
        widths = torch.zeros(len(power), dtype=torch.int64)
        budget = int(self.bits * parameters / 8)
        bitmap = layout.packed_bytes(len(power), 1)
        sizes = [0] + [layout.packed_bytes(self.patch**2, bits) + 2 for bits in range(1, MAX_WIDTH + 1)]  # and a scale
        if self.split == "even":
            whole = sum(len(power) * size + bitmap <= budget for size in sizes[1:])
            widths[:] = whole
            if whole < MAX_WIDTH:
                rest = budget - len(power) * sizes[whole] - bitmap * (2 if whole else 1)
                widths[order[: max(rest // (sizes[whole + 1] - sizes[whole]), 0 if whole else 1)]] += 1
            return widths
        shared = SHARED[self.split]
        share = max(1, (budget - bitmap * len(shared)) // sum(sizes[bits] for bits in shared))
        share = min(share, -(-len(power) // len(shared)))
        for index, bits in enumerate(shared):
            widths[order[index * share : (index + 1) * share]] = bits
        return widths


def _cut(matrix: Tensor, size: int) -> Tensor:
    """[rows, cols] → [patches, size²], row by row; what hangs over the edge is zero."""
    rows, cols = matrix.shape
    padded = F.pad(matrix, (0, -cols % size, 0, -rows % size))
    down, across = padded.shape[0] // size, padded.shape[1] // size
    return padded.reshape(down, size, across, size).transpose(1, 2).reshape(-1, size * size)
