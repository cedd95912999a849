"""DeltaMix: bits of singular directions by a 0/1 program. arXiv 2506.11087 (ICML 2026; also ADAMIX, PrinMix).

    min Σ_i E[i, b_i]    Σ bytes ≤ budget, at most `max_widths` different b; 0 drops a rank
    E[i, b] = σ_i² · ΔV_i·H·ΔV_iᵀ           ΔV_i: what GPTQ at b bits leaves of row i of V; E[i, 0] = σ_i² · V_i·H·V_iᵀ
    Ũ = Δ·H·Aᵀ · (A·H·Aᵀ + ε)⁻¹             A = diag(σ)·V̂; "reconstruction target correction" (RTC)

V is rounded first, then Ũ by GPTQ under A·H·Aᵀ. After reviews of the paper and code left over in ImPart: its text, its
ε, widths and σ's precision were not at hand. Ours: Ũ is solved as a correction of U, ε = 1e-3 · diag(A·H·Aᵀ), which
draws it to U; `errors` "both" adds what rounding U_i costs, σ_i² · ‖ΔU_i‖² · V̂_i·H·V̂_iᵀ (the paper's: "right");
`u_bits` "best" also tries widths of U common to all ranks; bytes are the file's; rank_widths.py solves the program.

Each ingredient can be switched off: `mixed`, for Delta-CoMe's groups of 8, 3 and 2 bits; `corrected`, for U as it is,
its errors kept within a term. Without both this is delta-come. Steps: least squares, one a rank, part of s (the paper's
groups of 128 with zero points: see delta_come.py). estimator "unbiased" is ours too. Where H is not known, H = 1.

    bits/parameter = Σ over ranks of (b_V · cols + b_U · rows + 32) / (rows · cols) ≤ bits, rows of U in whole bytes
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.codecs.linalg import Svd, svd
from deltaserve.codecs.rank_factors import (
    Factor,
    Scale,
    fit_step,
    low_rank_terms,
    quantise_left,
    quantise_left_together,
    quantise_rows,
)
from deltaserve.codecs.rank_moments import Moments, corrected
from deltaserve.codecs.rank_widths import allocate, group_bytes, paper_widths
from deltaserve.codecs.uniform import inner, nearest, normalised
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import Term

Errors = Literal["both", "right"]
WIDTHS = (2, 3, 4, 6)  # candidates, ascending
PAIRS = tuple(itertools.product(WIDTHS, WIDTHS))  # bits of V, bits of U
SCALE: Scale = "least-squares"


@dataclass(frozen=True)
class DeltaMix:
    needs_gram: ClassVar[bool] = True
    bits: float = 1.0  # ceiling on bits per parameter, > 0; at least one rank is kept
    mixed: bool = True
    corrected: bool = True
    max_widths: int = 3  # 1 … 4
    u_bits: int | Literal["same", "best"] = "best"  # one of WIDTHS for all ranks, or the rank's own b_V
    errors: Errors = "both"
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise CodecError(f"deltamix: bits {self.bits} is not > 0 and finite")
        for field in ("mixed", "corrected"):
            if not isinstance(getattr(self, field), bool):
                raise CodecError(f"deltamix: {field} {getattr(self, field)!r} is not true or false")
        if self.max_widths not in range(1, len(WIDTHS) + 1):
            raise CodecError(f"deltamix: max_widths {self.max_widths!r} is not in 1 … {len(WIDTHS)}")
        if self.u_bits not in ("same", "best", *WIDTHS):
            raise CodecError(f"deltamix: u_bits {self.u_bits!r} is not same, best or one of {WIDTHS}")
        if self.errors not in get_args(Errors):
            raise CodecError(f"deltamix: errors {self.errors!r} is not one of {get_args(Errors)}")
        if self.errors == "right" and self.u_bits == "best":
            raise CodecError("deltamix: errors 'right' counts nothing of U: u_bits 'best' would always be the fewest")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"deltamix: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "deltamix"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        scaled, unit = normalised(delta)
        basis = svd(scaled)
        chosen = (self._mixed if self.mixed else self._fixed)(basis, site.gram)
        u, sigma = basis.u[:, chosen.ranks], basis.sigma[chosen.ranks]
        moments = Moments.of(scaled, sigma[:, None] * chosen.v.values(), site.gram)
        quantise = quantise_left_together if self.corrected else quantise_left
        target = corrected(u, moments) if self.corrected else u
        pieces = quantise(target.float(), chosen.u_bits, chosen.v_bits, moments, SCALE)
        return low_rank_terms(sigma, pieces, chosen.v, moments, self.estimator, unit)

    def _fixed(self, basis: Svd, gram: Tensor | None) -> Chosen:
        widths = paper_widths((len(basis.u), basis.vt.shape[1]), len(basis.sigma), self.bits)
        ranks = torch.arange(len(widths))
        return Chosen(ranks, widths, widths, quantise_rows(basis.vt[ranks].float(), widths, gram, SCALE))

    def _mixed(self, basis: Svd, gram: Tensor | None) -> Chosen:
        """From the first ranks, as many as the budget could pay for at the fewest bits."""
        rows, cols = len(basis.u), basis.vt.shape[1]
        budget = int(self.bits * rows * cols / 8 + 1e-9)
        least = group_bytes(8, rows, cols, WIDTHS[0], WIDTHS[0]) / 8  # bytes of a rank
        count = min(len(basis.sigma), max(1, int(budget / least)))
        basis = Svd(basis.u[:, :count], basis.sigma[:count], basis.vt[:count])
        widths = torch.tensor(WIDTHS)
        tried = quantise_rows(
            basis.vt.float().repeat(len(WIDTHS), 1), widths.repeat_interleave(count), gram, SCALE
        )  # [widths · count, cols]
        errors = self._rank_errors(basis, tried.values().view(len(WIDTHS), count, cols), gram)
        sizes = [[group_bytes(n, rows, cols, u, v) for n in range(count + 1)] for v, u in PAIRS]
        usable = self._usable()
        subsets = [subset for pairs in usable for subset in itertools.combinations(pairs, self.max_widths)]
        choice = allocate(errors, torch.tensor([[0] * (count + 1), *sizes]), subsets, budget)
        if not bool(choice.any()):
            choice[errors[:, 0].argmax()] = usable[0][0]
        ranks = choice.nonzero()[:, 0]
        pair = choice[ranks] - 1
        v, u = pair // len(WIDTHS), pair % len(WIDTHS)
        return Chosen(ranks, widths[u], widths[v], tried.rows(v * count + ranks))

    def _rank_errors(self, basis: Svd, tried: Tensor, gram: Tensor | None) -> Tensor:
        """float64 [k, 1 + pairs] of V̂ float32 [widths, k, cols]: E of a dropped rank, and of one at each of PAIRS."""
        v_rows = basis.vt.float()
        errors = {v: inner(coded - v_rows, coded - v_rows, gram) for v, coded in zip(WIDTHS, tried, strict=True)}
        seen = {v: inner(coded, coded, gram) for v, coded in zip(WIDTHS, tried, strict=True)}
        rounding = {u: _rounding(basis.u.T.float(), u) if self.errors == "both" else 0 for u in WIDTHS}
        at_pairs = [errors[v] + seen[v] * rounding[u] for v, u in PAIRS]
        return basis.sigma[:, None] ** 2 * torch.stack([inner(v_rows, v_rows, gram), *at_pairs], 1)

    def _usable(self) -> list[list[int]]:
        """Numbers, from 1, of the PAIRS that may be used together."""
        same = [number for number, (v, u) in enumerate(PAIRS, 1) if u == v]
        common = {bits: [number for number, (_, u) in enumerate(PAIRS, 1) if u == bits] for bits in WIDTHS}
        if self.u_bits == "same":
            return [same]
        return [same, *common.values()] if self.u_bits == "best" else [common[int(self.u_bits)]]


class Chosen(NamedTuple):
    """The ranks kept, by falling σ, and their V̂."""

    ranks: Tensor  # int64 [r]
    u_bits: Tensor  # int64 [r]
    v_bits: Tensor  # int64 [r]
    v: Factor


def _rounding(columns: Tensor, bits: int) -> Tensor:
    """float32 [k, rows] → [k]: the square error of plain rounding."""
    highest = torch.full((len(columns), 1), 2.0**bits - 1)
    step = fit_step(columns, highest, SCALE)
    return (nearest(columns, step, highest) * step - columns).square().sum(1)
