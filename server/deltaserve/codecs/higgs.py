"""HIGGS on Δ: Hadamard, then the best grid of vectors for a Gaussian. Malinovskii et al., arXiv 2411.17525, NAACL 2025.

    Δ̂ = scale · C[codes] · T        T: block Hadamard of the input side, scale one for each row, or one number

A turned row is close to normal whatever Δ is, so one grid fits all: the 2^b vectors of `length` entries with the least
mean square error D on a normal source (the gaussian books of kernels/README.md); a code is the nearest of them.

    estimator "unbiased"   scale = rms · ‖x‖² / ⟨x, C[codes]⟩, x = Δ·Tᵀ / rms        ours: ⟨Δ, Δ̂⟩ = ‖Δ‖²
    estimator "paper"      scale = rms                                               least squares, shrinks Δ by 1 − D

After the abstract and the released code. Departures: blocks are the largest powers of two that a row is made of (1536 =
1024 + 512), not padded to 1024; one scale a row, not one for 1024 columns; grids up to 32 entries long, for rates under
a bit. Not here: the paper's bits by layer (linearity theorem).

    bits/parameter = b / length + 16 / cols, or 32 / (rows · cols) for one scale
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.errors import CodecError
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Book, Codebook, Rotated, Rotation, Term

Scale = Literal["row", "tensor"]

GRIDS = [  # (length, b), 0.25 … 4 bits an entry; the last of a rate is the best
    *[(length, 8) for length in (32, 24, 20, 16, 12, 10, 9)],
    *[(1, 1), (8, 8), (7, 8), (6, 7), (6, 8), (5, 7), (5, 8), (4, 7)],
    *[(1, 2), (2, 4), (4, 8), (3, 7), (2, 5), (3, 8), (1, 3), (2, 6), (2, 7), (1, 4), (2, 8)],
]
LENGTHS = sorted({length for length, _ in GRIDS})
CHUNK = 2**14  # blocks at a time


@dataclass(frozen=True)
class Higgs:
    needs_gram: ClassVar[bool] = False
    bits: float = 2.0  # ceiling of bits per parameter, scales counted; the grid of the highest rate that fits
    length: int | None = None  # of the grid's vectors; None: whatever is best
    scale: Scale = "row"
    estimator: Estimator = "unbiased"
    block: int = 1024  # largest Hadamard block, a power of two in 1 … 4096; 1: none

    def __post_init__(self) -> None:
        if self.length not in (None, *LENGTHS):
            raise CodecError(f"higgs: length {self.length!r} is not one of {LENGTHS}")
        if self.scale not in get_args(Scale):
            raise CodecError(f"higgs: scale {self.scale!r} is not one of {get_args(Scale)}")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"higgs: estimator {self.estimator!r} is not one of {get_args(Estimator)}")
        if not isinstance(self.block, int) or not 1 <= self.block <= 4096 or self.block & (self.block - 1):
            raise CodecError(f"higgs: block {self.block!r} is not a power of two in 1 … 4096")
        lowest = min(b / length for length, b in self._grids()) + (0.03 if self.scale == "row" else 0.001)
        if not lowest <= self.bits < 32:
            raise CodecError(f"higgs: bits {self.bits:g} is not in {lowest:.4g} … 32, scales included")

    @property
    def name(self) -> str:
        return "higgs"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:  # noqa: ARG002 (nothing is random here)
        rows, cols = delta.shape
        length, bits = self._grid(rows, cols)
        rotation, book = Rotation("hadamard", self.block), Book("gaussian")
        turned = rotation.forward(delta.double().contiguous())
        axis = 1 if self.scale == "row" else (0, 1)
        rms = turned.square().mean(axis, keepdim=True).sqrt()
        unit = turned / torch.where(rms > 0, rms, 1)
        table = book.table(bits, length)
        codes = _nearest(unit.float(), table)  # [rows, segments]
        scale = rms
        if self.estimator == "unbiased":
            decoded = table[codes].flatten(1)[:, :cols].double()
            dot = (unit * decoded).sum(axis, keepdim=True)
            scale = rms * unit.square().sum(axis, keepdim=True) / torch.where(dot > 0, dot, torch.inf)
        row = scale.bfloat16() if self.scale == "row" else scale.float().reshape(())
        packed = layout.pack(codes.flatten(), bits)
        return [Rotated(Codebook(rows, cols, bits, length, book, packed, row, signed=False), rotation)]

    def cost(self, rows: int, cols: int) -> int:
        """Bits of a matrix."""
        return 8 * self._bytes(rows, cols, *self._grid(rows, cols))

    def _grids(self) -> list[tuple[int, int]]:
        return [grid for grid in GRIDS if self.length in (None, grid[0])]

    def _grid(self, rows: int, cols: int) -> tuple[int, int]:
        """The lowest of a matrix too small for the budget, or for the length."""
        grids = [grid for grid in self._grids() if grid[0] <= cols] or [grid for grid in GRIDS if grid[0] <= cols]
        fitting = [grid for grid in grids if self._bytes(rows, cols, *grid) * 8 <= self.bits * rows * cols]
        return fitting[-1] if fitting else grids[0]

    def _bytes(self, rows: int, cols: int, length: int, bits: int) -> int:
        return layout.packed_bytes(rows * -(-cols // length), bits) + (2 * rows if self.scale == "row" else 4)


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """int64 [rows, segments]: the vector of the table nearest to each segment of x [rows, cols], of a shorter last
    segment in the entries that it has."""
    whole = x.shape[1] // table.shape[1] * table.shape[1]
    parts = [_nearest_blocks(x[:, :whole].reshape(-1, table.shape[1]), table).view(len(x), -1)] if whole else []
    if whole < x.shape[1]:
        parts.append(_nearest_blocks(x[:, whole:], table[:, : x.shape[1] - whole])[:, None])
    return torch.cat(parts, 1)


def _nearest_blocks(blocks: Tensor, table: Tensor) -> Tensor:
    half_norm = table.square().sum(1) / 2
    scores = (torch.addmm(-half_norm, part, table.T) for part in torch.split(blocks, CHUNK))
    return torch.cat([torch.from_numpy(score.numpy().argmax(1)) for score in scores])  # numpy's is the faster one
