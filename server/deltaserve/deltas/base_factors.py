"""Factors on a base's weight: what (IA)³ learns. Liu et al., arXiv 2205.05638, section 3.3.

    W = diag(rows) · W_base · diag(cols)        y = ((x ⊙ cols) · W_baseᵀ) ⊙ rows

They stand where a term would need the base's weight. 32 bits a row or column, as trained: for a 576 × 1536 matrix
0.02 … 0.06 bits per parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class BaseFactors:
    """rows [out] and cols [in], floating; None = 1."""

    rows: Tensor | None = None
    cols: Tensor | None = None

    def __bool__(self) -> bool:
        return self.rows is not None or self.cols is not None

    @property
    def nbytes(self) -> int:
        return sum(vector.nbytes for vector in (self.rows, self.cols) if vector is not None)

    def to(self, device: torch.device | str, *, copy: bool = False) -> BaseFactors:
        rows, cols = (None if v is None else v.to(device, copy=copy) for v in (self.rows, self.cols))
        return replace(self, rows=rows, cols=cols)

    def apply(self, weight: Tensor) -> Tensor:
        """weight float32 [out, in] → the same with its rows and columns scaled; `weight` is not changed."""
        if self.rows is not None:
            weight = weight * self.rows[:, None].float()
        return weight if self.cols is None else weight * self.cols.float()
