"""Low-rank factors rounded with error feedback: what delta-come and deltamix share.

    Δ = Σ_i σ_i · u_i · v_i  →  Δ̂ = Σ_i s_i · û_i · v̂_i        û_i [rows, 1], v̂_i [1, cols]: odd levels ±1, ±3, …

A rank has one width in bits for û_i and one for v̂_i; ranks of equal widths are one `LowRank` term. The step of a rank's
levels is part of s_i and costs nothing; steps of `group` entries (bfloat16) are stored. V is rounded first, by GPTQ
under H (columns = inputs), then U under A·H·Aᵀ (columns = ranks), A = diag(σ)·V̂. H = 1 where it is not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator
from deltaserve.codecs.linalg import Round, gptq
from deltaserve.codecs.rank_moments import Moments
from deltaserve.codecs.uniform import MAX_GAIN, grid_of, nearest, odd_codes
from deltaserve_kernels.terms import Coded, LowRank, Term

Scale = Literal["least-squares", "peak"]
TINY = torch.finfo(torch.float32).tiny
BLOCK = 128  # columns between two updates of all the columns to come
PEAK_RATIOS = 2.0 ** (-torch.arange(17) / 4)  # steps tried, of the one that reaches the largest entry


class Factor(NamedTuple):
    """Levels times a step for each rank, or for each `group` columns of a row."""

    levels: Tensor  # float32 [rows, r] or [r, cols], odd
    rank_step: Tensor | None  # float32 [1, r] or [r, 1]
    group_step: Tensor | None = None  # bfloat16 [rows, groups] or [r, groups]
    group: int | None = None

    def values(self) -> Tensor:
        """float32, as `levels`"""
        if self.rank_step is not None:
            return self.levels * self.rank_step
        assert self.group_step is not None
        assert self.group is not None
        steps = self.group_step.float().repeat_interleave(self.group, 1)
        return self.levels * steps[:, : self.levels.shape[1]]

    def rows(self, index: Tensor) -> Factor:
        rank_step, group_step = (None if step is None else step[index] for step in (self.rank_step, self.group_step))
        return Factor(self.levels[index], rank_step, group_step, self.group)

    def columns(self, index: Tensor) -> Factor:
        """Of a factor with steps of ranks."""
        assert self.rank_step is not None
        return Factor(self.levels[:, index], self.rank_step[:, index])

    def coded(self, bits: int) -> Coded:
        """Without the steps of ranks."""
        rows, cols = self.levels.shape
        codes = odd_codes(self.levels, bits)
        return Coded(rows, cols, bits, grid_of(bits), codes, row=self.group_step, group=self.group)


class Piece(NamedTuple):
    """One term in the making: some of the ranks, their columns of U coded."""

    u_bits: int
    v_bits: int
    ranks: Tensor  # int64 [n]
    u: Factor


def fit_step(rows: Tensor, highest: Tensor, scale: Scale) -> Tensor:
    """[n, m], [n, 1] → [n, 1]: the step that reaches the largest entry, or that of least squares."""
    reaching = rows.abs().amax(1, keepdim=True) / highest
    if scale == "peak":
        return reaching
    best, least = reaching, torch.full_like(reaching, torch.inf)
    for ratio in PEAK_RATIOS:
        step = reaching * ratio
        error = (nearest(rows, step, highest) * step - rows).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    levels = nearest(rows, best, highest)
    return (rows * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)


def quantise_rows(rows: Tensor, bits: Tensor, gram: Tensor | None, scale: Scale, group: int | None = None) -> Factor:
    """float32 [n, m] under `gram` [m, m], each row at its own bits, int64 [n].

    One step for a row, from what it is before errors are moved; or one for each `group` columns, as they are by then.
    """
    highest = (2.0**bits - 1)[:, None]
    whole = None if group else fit_step(rows, highest, scale)
    levels, steps = torch.empty_like(rows), []

    def fit(block: Tensor, _: int) -> Round:
        step = fit_step(block, highest, scale).bfloat16().float() if whole is None else whole
        steps.append(step)

        def round_column(values: Tensor, j: int) -> Tensor:
            levels[:, j] = nearest(values[:, None], step, highest)[:, 0]
            return levels[:, j] * step[:, 0]

        return round_column

    gptq(rows, gram, fit, group=group or BLOCK)
    if whole is not None:
        return Factor(levels, whole)
    return Factor(levels, None, torch.cat(steps, 1).bfloat16(), group)


def quantise_columns(columns: Tensor, bits: Tensor, gram: Tensor, scale: Scale) -> Factor:
    """float32 [m, n] under `gram` [n, n], each column at its own bits, int64 [n], with one step."""
    highest = 2.0**bits - 1
    levels, steps = torch.empty_like(columns), torch.empty(columns.shape[1])

    def fit(block: Tensor, start: int) -> Round:
        stop = start + block.shape[1]
        steps[start:stop] = fit_step(block.T.contiguous(), highest[start:stop, None], scale)[:, 0]

        def round_column(values: Tensor, j: int) -> Tensor:
            levels[:, j] = nearest(values, steps[j], highest[j])
            return levels[:, j] * steps[j]

        return round_column

    gptq(columns, gram, fit, group=BLOCK)
    return Factor(levels, steps[None])


def bit_groups(u_bits: Tensor, v_bits: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(bits of U, bits of V, int64 ranks) of the ranks that share them, the widest first."""
    pairs = list(zip(u_bits.tolist(), v_bits.tolist(), strict=True))
    for u, v in sorted(set(pairs), reverse=True):
        yield u, v, torch.tensor([rank for rank, pair in enumerate(pairs) if pair == (u, v)])


def quantise_left(
    target: Tensor, u_bits: Tensor, v_bits: Tensor, moments: Moments, scale: Scale, group: int | None = None
) -> list[Piece]:
    """U float32 [rows, r], the ranks of each term by themselves: their errors stay among them."""
    pieces = []
    for u, v, ranks in bit_groups(u_bits, v_bits):
        columns, coupling = target[:, ranks], moments.coupling[ranks][:, ranks]
        if group:
            factor = quantise_rows(columns, torch.full((len(columns),), u), coupling, scale, group)
        else:
            factor = quantise_columns(columns, u_bits[ranks], coupling, scale)
        pieces.append(Piece(u, v, ranks, factor))
    return pieces


def quantise_left_together(
    target: Tensor, u_bits: Tensor, v_bits: Tensor, moments: Moments, scale: Scale
) -> list[Piece]:
    """U float32 [rows, r], a rank's errors moved onto all later ones, whatever their bits."""
    whole = quantise_columns(target, u_bits, moments.coupling, scale)
    return [Piece(u, v, ranks, whole.columns(ranks)) for u, v, ranks in bit_groups(u_bits, v_bits)]


def low_rank_terms(
    sigma: Tensor, pieces: list[Piece], v: Factor, moments: Moments, estimator: Estimator, unit: float
) -> list[Term]:
    """`unit` is what Δ was divided by. estimator "unbiased": all s_i times g, such that ⟨Δ, Δ̂⟩_H = ‖Δ‖²_H; g within
    a factor of MAX_GAIN, since few ranks of many cannot stand for what was dropped."""
    gain = 1.0
    if estimator == "unbiased":
        along = sum(float((moments.cross[:, piece.ranks] * piece.u.values()).sum()) for piece in pieces)
        gain = min(max(float(moments.power) / along, 1 / MAX_GAIN), MAX_GAIN) if along > 0 else 1.0
    terms: list[Term] = []
    for piece in pieces:
        right = v.rows(piece.ranks)
        s = sigma[piece.ranks].double() * gain * unit
        for factor in (piece.u, right):
            if factor.rank_step is not None:
                s = s * factor.rank_step.double().flatten()
        terms.append(LowRank(piece.u.coded(piece.u_bits), s.float(), right.coded(piece.v_bits)))
    return terms
