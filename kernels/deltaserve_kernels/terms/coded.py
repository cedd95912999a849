"""A coded matrix.

    decode = diag(row) · grid(codes) · diag(col) ⊙ M           scale = row · col, or one number

`grid`, with b bits: sign (1 bit: ±1) · odd (2·code − 2^b + 1: ±1, ±3, …) · int (code − 2^(b−1)) · table (table[code]) ·
float (16 or 32 bit, no code, the value itself). Zero points are not needed: every grid is symmetric but `table`, which
says its values itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.terms.masks import ExplicitMask, SeededMask
from deltaserve_kernels.terms.packed import DERIVED, Packed

Grid: TypeAlias = Literal["sign", "odd", "int", "table", "float"]


@dataclass(frozen=True)
class Coded(Packed):
    """[rows, cols].

    codes   uint8 [rows, layout.packed_bytes(n, bits)] for coded grids; float [rows, n] for grid float; n = cols, or the
            survivors of a row under a mask
    row     float [] or [rows, 1], or [rows, ceil(cols / group)]: one for each `group` columns (no mask then)
    col     float [cols] or None;  table float32 [2^bits] for grid table
    columns int16/int32 [rows, n]: the mask spelled out, made once at load by `serving`; None on disk
    """

    rows: int
    cols: int
    bits: int
    grid: Grid
    codes: Tensor
    row: Tensor | None = None
    col: Tensor | None = None
    mask: SeededMask | ExplicitMask | None = None
    group: int | None = None
    table: Tensor | None = None
    columns: Tensor | None = field(default=None, metadata=DERIVED)

    @property
    def num_codes(self) -> int:
        """Codes a row."""
        return self.mask.num_survivors(self.cols) if self.mask else self.cols

    def values(self, dtype: torch.dtype) -> Tensor:
        """grid(codes), before scales: [rows, n]. Exact in any float dtype for sign, odd and int grids."""
        if self.grid == "float":
            return self.codes.to(dtype)
        return layout.lookup(self.codes, self.levels(dtype), self.bits, self.num_codes)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """[2^bits]: what the codes of a coded grid stand for."""
        if self.grid == "table":
            assert self.table is not None
            return self.table.to(dtype)
        steps = torch.arange(2**self.bits, device=self.codes.device, dtype=dtype)
        levels: Tensor = steps - 2 ** (self.bits - 1) if self.grid == "int" else 2 * steps - (2**self.bits - 1)
        return levels

    def row_scales(self, dtype: torch.dtype) -> Tensor | None:
        """`row` as it multiplies values: [], [rows, 1] or [rows, cols]."""
        if self.row is None or self.group is None:
            return None if self.row is None else self.row.to(dtype)
        return self.row.to(dtype).repeat_interleave(min(self.group, self.cols), 1)[:, : self.cols]

    def serving(self) -> Coded:
        """A mask is spelled out, in 2 bytes an entry where the width allows it."""
        if self.mask is None or self.columns is not None:
            return self
        columns = self.mask.columns(self.rows, self.cols, str(self.codes.device))
        index_dtype = torch.int16 if self.cols <= 2**15 else torch.int32
        return replace(self, columns=columns.to(index_dtype))

    def problems(self) -> list[str]:
        if not isinstance(self.mask, ExplicitMask):
            return []
        columns = self.mask.columns(self.rows, self.cols)
        if bool((columns >= self.cols).any()):
            return [f"mask: a place past the last of {self.cols} columns"]
        rising = (columns[:, 1:] > columns[:, :-1]).all()
        return [] if bool(rising) else ["mask: the places of a row are not ascending"]

    def decode(self) -> Tensor:
        """float32 [rows, cols]"""
        values = self.values(torch.float32)
        if self.mask is not None:
            columns = self.serving().columns
            assert columns is not None
            values = torch.zeros(self.rows, self.cols, device=values.device).scatter_(1, columns.long(), values)
        if (scales := self.row_scales(torch.float32)) is not None:
            values = values * scales
        return values if self.col is None else values * self.col.float()
