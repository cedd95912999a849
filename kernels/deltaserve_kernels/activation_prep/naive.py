"""Definition of the activations that fused kernels read.

    x̂ = float16(x · 2^−e),   e = floor(log2(max_k |x[k]|)) − 13, at least −113          one e for each row

x̂ of a bfloat16 x is exact down to 2^−27 of the row's largest entry: 2^13 · 2^−27 is float16's smallest normal number. A
variant is what a part makes of x first: columns picked, then each multiplied by a number.

Beside x̂ itself there is a copy for codes of 1, 2 and 4 bits each, multiplied by 2^−p, p the lowest bit at which the
code that meets the column is read (grouped_matmul/fused.py), and sums of x̂ over 16, 32, 64 and 128 columns, for zero
points.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP, LEAST = 13, -113
COPIES = {16: 0, 1: 1, 2: 2, 4: 3}  # bits of a code → number of the copy
SUMS = (16, 32, 64, 128)  # columns


def activation_prep(x: Tensor, columns: Tensor | None = None, col: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [T, K] → x̂ float16 [T, K'], 2^e float32 [T]. An entry that is not finite stays so, and harms its row alone."""
    wide = x.float() if columns is None else x[:, columns.long()].float()
    if col is not None:
        wide = wide * col
    peak = wide.abs().amax(1)
    exponent = (torch.frexp(peak).exponent - 1 - TOP).where(peak > 0, LEAST).clamp(min=LEAST)
    return torch.ldexp(wide, -exponent[:, None]).half(), torch.ldexp(torch.ones_like(peak), exponent)


def slots_in_place(bits: int) -> int:
    """Slots of a 16-bit lane that are read where they lie: those that end by bit 10 (8 for 4 bits)."""
    return 8 // bits if bits == 4 else 10 // bits


def read_at(bits: int, lanes: int, cols: int) -> Tensor:
    """int64 [cols]: p of each column."""
    slot = torch.arange(cols) // lanes % (16 // bits)
    kept = slots_in_place(bits)
    return torch.where(slot < kept, slot, slot - kept) * bits
