"""A vector quantiser: one code for a block of entries, its vector from a table that layers and tenants share. Ours.

    decode[i·tile + r, s·length + j] = row · 2^((level−8)/4) · 2^−boost · Σ_k gain_k · (±) C[place_k(i, s)][r·length+j]
    place_k = index of code_k + (k mod turns) · 2^index_bits

A block is a segment of `length` columns in each of `tile` consecutive rows; the last segment and the last tile may be
shorter. Under `signed` the highest bit of a code is the sign (1 → −), the others are the index. Stages k refine one
another and take turns at `turns` parts of the table: what a stage leaves is far from all vectors of its own part, and
to another part like new (decision 0028). Levels belong to rows, boosts to columns: a column that carries large
activations is coded larger than it is, and so with less noise. Segments of the input dimension are what makes it cheap
to serve: see codebook_matmul.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.terms.books import Book
from deltaserve_kernels.terms.packed import Packed

LEVEL_BITS, LEVELS_PER_OCTAVE = 4, 4


@dataclass(frozen=True)
class Codebook(Packed):
    """[rows, cols].

    codes   uint8 [layout.packed_bytes(stages · tiles · segments, bits)], one run: stage by stage, tile by tile
    row     float [] or [rows, 1];  gains float32 [stages] or None: one stage of gain 1
    levels  uint8 [layout.packed_bytes(rows, 4)] or None: all 8
    boosted int16 or int32 [n] or None: columns with a boost, those with 1 first; boosts[b − 1] of them have the boost b
    """

    rows: int
    cols: int
    bits: int
    length: int
    book: Book
    codes: Tensor
    row: Tensor
    tile: int = 1
    signed: bool = True
    gains: Tensor | None = None
    levels: Tensor | None = None
    boosted: Tensor | None = None
    boosts: tuple[int, ...] = ()
    turns: int = 1  # a power of two

    @property
    def segments(self) -> int:
        return -(-self.cols // self.length)

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile)

    @property
    def stages(self) -> int:
        return 1 if self.gains is None else len(self.gains)

    @property
    def index_bits(self) -> int:
        return self.bits - self.signed

    @property
    def table_bits(self) -> int:
        """log2 of the vectors of all parts."""
        return self.index_bits + self.turns.bit_length() - 1

    def indices(self) -> tuple[Tensor, Tensor | None]:
        """int64 [stages, tiles, segments], places in the table, and what multiplies their vectors, float32: None
        where that is 1."""
        count = self.stages * self.tiles * self.segments
        codes = layout.unpack(self.codes, self.bits, count).long().view(self.stages, self.tiles, self.segments)
        factor = None if self.gains is None else self.gains.float()[:, None, None].expand(codes.shape)
        part = (torch.arange(self.stages, device=codes.device) % self.turns << self.index_bits)[:, None, None]
        if not self.signed:
            return part + codes, factor
        sign = 1.0 - 2.0 * (codes >> self.index_bits)
        return part + (codes & (2**self.index_bits - 1)), sign if factor is None else sign * factor

    def table(self) -> Tensor:
        """float32 [2^table_bits, tile, length]"""
        table = self.book.table(self.table_bits, self.tile * self.length, str(self.codes.device))
        return table.view(-1, self.tile, self.length)

    def row_scales(self) -> Tensor:
        """float32 [] or [rows, 1]"""
        scale = self.row.float()
        if self.levels is None:
            return scale
        levels = layout.unpack(self.levels, LEVEL_BITS, self.rows).float()[:, None]
        return scale * torch.exp2((levels - 2 ** (LEVEL_BITS - 1)) / LEVELS_PER_OCTAVE)

    def column_scales(self) -> Tensor | None:
        """float32 [cols], powers of two, or None: all 1."""
        if self.boosted is None:
            return None
        scales = torch.ones(self.cols, device=self.codes.device)
        counts = torch.tensor(self.boosts, device=self.codes.device)
        boost = torch.arange(1, len(self.boosts) + 1, device=self.codes.device).repeat_interleave(counts)
        scales[self.boosted.long()] = torch.exp2(-boost.float())
        return scales

    def problems(self) -> list[str]:
        if self.boosted is None or not len(self.boosted):
            return []
        if int(self.boosted.min()) < 0 or int(self.boosted.max()) >= self.cols:
            return [f"a boosted column that is not in 0 … {self.cols - 1}"]
        columns = self.boosted.long()
        return [] if int(torch.bincount(columns).max()) == 1 else ["a column is boosted twice"]

    def serving(self) -> Codebook:
        return self

    def decode(self) -> Tensor:
        """float32 [rows, cols]"""
        index, factor = self.indices()
        table, total = self.table(), None
        for k in range(self.stages):
            blocks = table[index[k]]  # [tiles, segments, tile, length]
            if factor is not None:
                blocks = blocks * factor[k][..., None, None]
            total = blocks if total is None else total + blocks
        assert total is not None
        whole = total.transpose(1, 2).reshape(self.tiles * self.tile, self.segments * self.length)
        whole = whole[: self.rows, : self.cols] * self.row_scales()
        columns = self.column_scales()
        return whole if columns is None else whole * columns
