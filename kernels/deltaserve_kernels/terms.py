"""The terms of the algebra: what a compressed linear layer is made of, as packed tensors.

    Δ̂      = Σ_j Term_j                                      [rows, cols] = [out, in]
    Term   = Coded  |  LowRank = Coded(L) · diag(s) · Coded(R)
    Coded  = diag(row) · grid(codes) · diag(col) ⊙ M          scale = row · col, or one number

`grid`: sign (1 bit: 0 → −1, 1 → +1) · int (code − 2^(bits−1)) · float (16 or 32 bit, no code, the value itself).
`M`: none, or one survivor in every group of `group` consecutive columns of a row, its place drawn by the seed. Only the
survivors are stored; the seed is stored, never the mask. Source: ours (architecture); codecs map papers onto it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.philox import random_words

Grid: TypeAlias = Literal["sign", "int", "float"]


def site_number(name: str) -> int:
    """32-bit number of a tensor name: the first four bytes, little-endian, of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


@dataclass(frozen=True)
class SeededMask:
    """One survivor in each group of `group` consecutive columns (the last group may be shorter).

    Survivor of group g in row r, where the group has G columns: column g·group + (word(r, g) · G >> 32), with word from
    `philox.random_words(seed, site)`. Every column survives with probability 1/G exactly, up to 2^-32.
    """

    group: int
    seed: int
    site: int

    def num_groups(self, cols: int) -> int:
        return -(-cols // self.group)

    def group_sizes(self, cols: int, device: str = "cpu") -> Tensor:
        """int64 [groups]"""
        starts = torch.arange(0, cols, self.group, device=device)
        return (cols - starts).clamp(max=self.group)

    def columns(self, rows: int, cols: int, device: str = "cpu") -> Tensor:
        """int64 [rows, groups]: the surviving column of each group."""
        words = random_words(self.seed, self.site, rows, self.num_groups(cols), device=device)
        starts = torch.arange(0, cols, self.group, device=device)
        return starts + (words * self.group_sizes(cols, device) >> 32)


@dataclass(frozen=True)
class Coded:
    """A coded matrix [rows, cols].

    codes   uint8 [rows, ceil(n·bits/8)] for grids sign and int; float [rows, n] for grid float; n = cols, or the number
            of groups under a mask
    row     float [] or [rows, 1];  col  float [cols] or None
    columns int16/int32 [rows, n]: the mask spelled out, made once at load by `with_columns`; None on disk
    """

    rows: int
    cols: int
    bits: int
    grid: Grid
    codes: Tensor
    row: Tensor | None = None
    col: Tensor | None = None
    mask: SeededMask | None = None
    columns: Tensor | None = None

    @property
    def num_codes(self) -> int:
        """Codes a row."""
        return self.mask.num_groups(self.cols) if self.mask else self.cols

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by local name."""
        named = {"codes": self.codes, "row": self.row, "col": self.col}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes held, summed from the real tensors, spelled-out masks included."""
        derived = 0 if self.columns is None else self.columns.nbytes
        return derived + sum(t.nbytes for t in self.tensors().values())

    def values(self, dtype: torch.dtype) -> Tensor:
        """grid(codes), before scales: [rows, n]. Exact in any float dtype for sign and int grids."""
        if self.grid == "float":
            return self.codes.to(dtype)
        steps = torch.arange(2**self.bits, device=self.codes.device, dtype=dtype)
        table = 2 * steps - 1 if self.grid == "sign" else steps - 2 ** (self.bits - 1)
        return layout.lookup(self.codes, table, self.bits, self.num_codes)

    def with_columns(self) -> Coded:
        """The serving form: a seeded mask is spelled out, in 2 bytes an entry where the width allows it."""
        if self.mask is None or self.columns is not None:
            return self
        columns = self.mask.columns(self.rows, self.cols, str(self.codes.device))
        index_dtype = torch.int16 if self.cols <= 2**15 else torch.int32
        return replace(self, columns=columns.to(index_dtype))

    def to(self, device: torch.device | str, *, copy: bool = False) -> Coded:
        """The same term with its tensors on `device`; `copy` even where they are there already."""
        moved: dict[str, Any] = {name: tensor.to(device, copy=copy) for name, tensor in self.tensors().items()}
        if self.columns is not None:
            moved["columns"] = self.columns.to(device, copy=copy)
        return replace(self, **moved)

    def decode(self) -> Tensor:
        """float32 [rows, cols]: the definition of the term."""
        values = self.values(torch.float32)
        if self.mask is not None:
            columns = self.with_columns().columns
            assert columns is not None
            values = torch.zeros(self.rows, self.cols, device=values.device).scatter_(1, columns.long(), values)
        if self.row is not None:
            values = values * self.row.float()
        return values if self.col is None else values * self.col.float()


@dataclass(frozen=True)
class LowRank:
    """left [rows, r] · diag(s) · right [r, cols]; s float32 [r]."""

    left: Coded
    s: Tensor
    right: Coded

    @property
    def rows(self) -> int:
        return self.left.rows

    @property
    def cols(self) -> int:
        return self.right.cols

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.s.nbytes + self.right.nbytes

    def with_columns(self) -> LowRank:
        return LowRank(self.left.with_columns(), self.s, self.right.with_columns())

    def to(self, device: torch.device | str, *, copy: bool = False) -> LowRank:
        s = self.s.to(device, copy=copy)
        return LowRank(self.left.to(device, copy=copy), s, self.right.to(device, copy=copy))

    def decode(self) -> Tensor:
        """float32 [rows, cols]"""
        return (self.left.decode() * self.s) @ self.right.decode()


Term: TypeAlias = Coded | LowRank
