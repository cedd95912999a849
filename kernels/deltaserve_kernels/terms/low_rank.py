"""Low rank: left [rows, r] · diag(s) · right [r, cols]; s float32 [r]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltaserve_kernels.terms.coded import Coded
from deltaserve_kernels.terms.packed import Packed


@dataclass(frozen=True)
class LowRank(Packed):
    left: Coded
    s: Tensor
    right: Coded

    @property
    def rows(self) -> int:
        return self.left.rows

    @property
    def cols(self) -> int:
        return self.right.cols

    def serving(self) -> LowRank:
        return LowRank(self.left.serving(), self.s, self.right.serving())

    def decode(self) -> Tensor:
        """float32 [rows, cols]"""
        return (self.left.decode() * self.s) @ self.right.decode()
