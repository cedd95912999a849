"""A term on some of the column blocks of a matrix, the others zero.

decode[:, b·block : (b+1)·block] = the next `block` columns of the term, for each present block b
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.terms.packed import DERIVED, Packed

if TYPE_CHECKING:
    from deltaserve_kernels.terms import Term


@dataclass(frozen=True)
class Placed(Packed):
    """[term.rows, cols].

    present uint8 [ceil(blocks / 8)]: one bit a block, in layout's order
    columns int64 [term.cols]: the columns of the term's columns, made at load by `serving`
    """

    term: Term
    cols: int
    block: int
    present: Tensor
    columns: Tensor | None = field(default=None, metadata=DERIVED)

    @property
    def rows(self) -> int:
        return self.term.rows

    def places(self) -> Tensor:
        """int64 [term.cols]"""
        blocks = layout.unpack(self.present, 1, -(-self.cols // self.block)).nonzero()  # [n, 1]
        columns = (blocks * self.block + torch.arange(min(self.block, self.cols), device=blocks.device)).flatten()
        return columns[columns < self.cols]

    def problems(self) -> list[str]:
        found = len(self.places())
        if found != self.term.cols:
            return [f"a term of {self.term.cols} columns in blocks of {found}"]
        return super().problems()

    def serving(self) -> Placed:
        if self.columns is not None:
            return self
        return replace(self, term=self.term.serving(), columns=self.places())

    def decode(self) -> Tensor:
        """float32 [rows, cols]"""
        whole = torch.zeros(self.rows, self.cols, device=self.present.device)
        whole[:, self.places()] = self.term.decode()
        return whole
