"""ImPart: singular directions, each thinned at random by how little it matters. arXiv 2504.13237 (ACL 2025).

    Δ = U diag(σ) Vᵀ = Σ_k σ_k u_k v_kᵀ,   the last `tail` share of the directions is cut off (β)
    p_k = (1 − σ_k^C / σ_1^C) · γ          share of the entries of u_k and of v_k that is dropped
    from the last direction on p_k = 1, until mean p = γ;   what is left of u_k and v_k is divided by 1 − p_k, each

γ is not an option: it is the smallest (by bisection) whose terms, everything counted, fit `bits`. One direction is kept
whatever the budget. The released code has the drop ratio as its option, β = 0.8 (here 0.4) and C = 0.5.

Masks are seeds (ours; the paper's ratio does not count its masks): SeededMask(G, keep = N) on both factors, directions
of one keep rate N/G and one width together in one LowRank. A mask runs along the rows of a Coded, so in U, [rows, r],
each row keeps N of every G directions; u_k keeps a share N/G of its entries in the mean, not exactly.

    estimator "paper"     1 / (1 − p_k), p_k the share that the draw has dropped of u_k, of v_k alike; in s with σ_k
    estimator "unbiased"  ours, in its place: ‖u_k‖² / ⟨u_k, û_k⟩, what the draw has left of the direction itself

    quantised   ImPart-Qt: directions 0 … 1 at 8 bits, 2 … 33 at 3, the rest at 2, odd levels; otherwise bfloat16
    bits/parameter = Σ_k (bits_k (1 − p_k) (rows + cols) + 32) / (rows · cols)

Not here: sparse-aware GPTQ. On the device a masked factor takes 2 bytes a survivor more.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from deltaserve.codecs.base import Estimator, Site
from deltaserve.codecs.directions import Masks, low_rank, low_rank_bits
from deltaserve.codecs.linalg import svd
from deltaserve.codecs.uniform import normalised
from deltaserve.errors import CodecError
from deltaserve_kernels.terms import SeededMask, Term

RATES = tuple(map(Fraction, ("1/32", "1/16", "1/8", "3/16", "1/4", "3/8", "1/2", "5/8", "3/4", "7/8", "1")))
WIDTHS = ((2, 8), (34, 3))  # the first directions, and their bits
LAST_WIDTH = 2
STEPS = 30  # of the bisection


class Span(NamedTuple):
    """Directions start … stop − 1, of one keep rate and one width."""

    start: int
    stop: int
    keep: Fraction
    bits: int

    def masks(self, site: Site, number: int) -> Masks:
        """Of span `number`: two streams of its own."""
        if self.keep == 1:
            return None, None
        group, keep = self.keep.denominator, self.keep.numerator
        left, right = (SeededMask(group, site.seed, site.number, keep=keep, stream=2 * number + i) for i in (0, 1))
        return left, right


@dataclass(frozen=True)
class ImPart:
    needs_gram: ClassVar[bool] = False
    bits: float = 0.5  # per parameter, everything counted, > 0
    quantised: bool = True  # 8, 3 and 2 bits; else 16
    tail: float = 0.4  # β, in 0 … 1
    exponent: float = 0.5  # C, > 0
    estimator: Estimator = "unbiased"

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise CodecError(f"impart: bits {self.bits} is not > 0 and finite")
        if not isinstance(self.quantised, bool):
            raise CodecError(f"impart: quantised {self.quantised!r} is not true or false")
        if not 0 <= self.tail < 1:
            raise CodecError(f"impart: tail {self.tail} is not in 0 … 1")
        if not 0 < self.exponent < math.inf:
            raise CodecError(f"impart: exponent {self.exponent} is not > 0 and finite")
        if self.estimator not in get_args(Estimator):
            raise CodecError(f"impart: estimator {self.estimator!r} is not one of {get_args(Estimator)}")

    @property
    def name(self) -> str:
        return "impart"

    def config(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        rows, cols = delta.shape
        unit, factor = normalised(delta)
        u, sigma, vt = svd(unit)
        return [
            low_rank(
                u[:, span.start : span.stop],
                sigma[span.start : span.stop] * factor,
                vt[span.start : span.stop],
                span.bits,
                masks=span.masks(site, number),
                estimator=self.estimator,
            )
            for number, span in enumerate(self._plan(sigma, rows, cols, site))
        ]

    def _plan(self, sigma: Tensor, rows: int, cols: int, site: Site) -> list[Span]:
        """The spans for the smallest γ that fits; for one direction, thinned as far as it goes, where none does."""

        def size(spans: list[Span]) -> int:
            return sum(
                low_rank_bits(rows, cols, span.stop - span.start, span.bits, span.masks(site, 0)) for span in spans
            )

        budget = self.bits * rows * cols
        whole = self._spans(sigma, rows, cols, 0.0)
        if size(whole) <= budget:
            return whole
        low, high = 0.0, 1.0
        best = [Span(0, 1, RATES[0], self._width(0))]
        for _ in range(STEPS):
            gamma = (low + high) / 2
            spans = self._spans(sigma, rows, cols, gamma)
            if size(spans) <= budget:
                best, high = spans, gamma
            else:
                low = gamma
        return best

    def _spans(self, sigma: Tensor, rows: int, cols: int, gamma: float) -> list[Span]:
        """One direction at least."""
        whole = min(len(sigma), math.ceil((1 - self.tail) * min(rows, cols)))
        kept = 1 - gamma * (1 - (sigma[:whole] / sigma[0].clamp(min=torch.finfo(torch.float64).tiny)) ** self.exponent)
        dropped = min(int((kept.flip(0).cumsum(0) <= kept.sum() - (1 - gamma) * whole + 1e-9).sum()), whole - 1)
        rates = torch.tensor([float(rate) for rate in RATES], dtype=torch.float64)
        nearest = (kept[: whole - dropped, None].log() - rates.log()).abs().argmin(1).tolist()
        keys = [(RATES[index], self._width(k)) for k, index in enumerate(nearest)]
        spans, start = [], 0
        for (keep, bits), same in groupby(keys):
            stop = start + len(list(same))
            spans.append(Span(start, stop, keep, bits))
            start = stop
        return spans

    def _width(self, direction: int) -> int:
        if not self.quantised:
            return 16
        return next((bits for before, bits in WIDTHS if direction < before), LAST_WIDTH)
