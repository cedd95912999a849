"""What low-rank codecs share: factors in 16 bits or in few, with or without a seeded mask, and how many a budget buys.

    Δ̂ = left · diag(s) · right,   a direction = a column of left, a row of right

Below 16 bits a direction v has one step, in s, and odd levels l: v̂ = step · l, least squares in the choice of levels.

    estimator "unbiased"   step = ‖v‖² / ⟨v, M ⊙ l⟩             ⟨v, v̂⟩ = ‖v‖² whatever the mask M has left
    estimator "paper"      step = ⟨v, l⟩ / ‖l‖² · n / Σ M        least squares, and 1 / (share that is left)

    bits = survivors · bits, in whole bytes a stored row, + 32 r for s
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator
from deltaserve.codecs.uniform import fitted_step, grid_of, odd_codes, odd_levels
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, LowRank, SeededMask

Masks: TypeAlias = tuple[SeededMask | None, SeededMask | None]  # of left, along the directions; of right, along columns

FACTOR_BITS = (1, 2, 3, 4, 5, 8, 16)
NO_MASKS: Masks = (None, None)


def whole_low_rank(left: Tensor, s: Tensor, right: Tensor) -> LowRank:
    """left float [rows, r], s float [r], right float [r, cols]: factors as they are, in bfloat16."""
    rank = len(s)
    coded_left = Coded(len(left), rank, 16, "float", left.bfloat16().contiguous())
    return LowRank(coded_left, s.float(), Coded(rank, right.shape[1], 16, "float", right.bfloat16().contiguous()))


def low_rank(
    left: Tensor, s: Tensor, right: Tensor, bits: int, *, masks: Masks = NO_MASKS, estimator: Estimator = "unbiased"
) -> LowRank:
    """left float [rows, r], s float64 [r], right float [r, cols]: directions of moderate size, at most about 1."""
    coded_left, left_step = _coded(left.float(), 0, bits, masks[0], estimator)
    coded_right, right_step = _coded(right.float(), 1, bits, masks[1], estimator)
    return LowRank(coded_left, (s * left_step.double() * right_step.double()).float(), coded_right)


def low_rank_bits(rows: int, cols: int, rank: int, bits: int = 16, masks: Masks = NO_MASKS) -> int:
    """Of the term that either makes."""
    stored = rows * _row_bits(rank, bits, masks[0]) + rank * _row_bits(cols, bits, masks[1])
    return stored + 32 * rank


def largest_rank(budget: float, rows: int, cols: int, bits: int = 16) -> int:
    """Of a term of at most `budget` bits in all; at least 1, at most min(rows, cols)."""
    rank = min(int(budget / (bits * (rows + cols) + 32)), rows, cols)  # bytes that are not full make it fewer
    while rank > 1 and low_rank_bits(rows, cols, rank, bits) > budget:
        rank -= 1
    return max(rank, 1)


def _row_bits(cols: int, bits: int, mask: SeededMask | None) -> int:
    number = mask.num_survivors(cols) if mask else cols
    return bits * number if bits == 16 else 8 * layout.packed_bytes(number, bits)


def _coded(
    factor: Tensor, along: int, bits: int, mask: SeededMask | None, estimator: Estimator
) -> tuple[Coded, Tensor]:
    """A factor whose directions run along dimension `along`, and their steps, float32 [r]."""
    levels = _levels(factor if along else factor.T, bits)
    levels = levels if along else levels.T.contiguous()
    rows, cols = factor.shape
    columns = mask.columns(rows, cols) if mask else None
    left_over = torch.ones_like(levels) if columns is None else torch.zeros_like(levels).scatter_(1, columns, 1.0)
    if estimator == "unbiased":
        step = _ratio(factor.square().sum(along), (factor * levels * left_over).sum(along))
    else:
        least = _ratio((factor * levels).sum(along), levels.square().sum(along))
        step = least * _ratio(torch.full_like(least, factor.shape[along]), left_over.sum(along))
    survivors = levels if columns is None else levels.gather(1, columns)
    codes = survivors.bfloat16() if bits == 16 else odd_codes(survivors, bits)
    return Coded(rows, cols, bits, "float" if bits == 16 else grid_of(bits), codes, mask=mask), step


def _levels(directions: Tensor, bits: int) -> Tensor:
    """float32 [r, n] → the nearest odd levels, of a step that reaches the peak at 8 bits; at 16, bfloat16."""
    if bits == 16:
        return directions.bfloat16().float().contiguous()
    step = directions.abs().amax(1, keepdim=True) / 255 if bits == 8 else fitted_step(directions, bits)
    return odd_levels(directions, step, bits).contiguous()


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """0 where nothing is left."""
    return torch.where(under > 0, over / torch.where(under > 0, under, 1), 0)
