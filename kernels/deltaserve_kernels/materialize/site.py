"""Long runs of a step: a layer's W + Δ is written out once, and one dense product serves all rows of the run.

    rows of a run that is long enough    y = x · (W + Δ)ᵀ + b        W + Δ in scratch memory, one for each shape
    all others                           y = x · Wᵀ + b, and packed codes: fused/site.py

Nothing is kept from layer to layer or from step to step: W is never changed, and a delta may come or go between steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels.fused.bundle import Bundle, SitePlan, make_bundle
from deltaserve_kernels.fused.compiles import expected
from deltaserve_kernels.fused.parts import LANES
from deltaserve_kernels.fused.site import FusedKernels, FusedStep
from deltaserve_kernels.fused.slots import padded
from deltaserve_kernels.materialize.fused import materialize_kernel
from deltaserve_kernels.segments import Segment, Segments

KINDS = ("codes", "gather", "factors")
ROWS, COLS, RANKS = 32, 32, 32  # of a tile
WARPS = 4


class Scratch:
    """Memory for W + Δ, uninitialised: one matrix for each shape, whichever layer is written. `thresholds`: rows of a
    run from which it is worth while, by kind; a delta with several kinds at a site takes the least."""

    def __init__(self, kernels: FusedKernels, shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> None:
        self.kernels = kernels
        self.thresholds: Mapping[str, int] = {}
        self.matrices = {shape: torch.empty(shape, dtype=dtype, device=kernels.device) for shape in set(shapes)}

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def takes(self, plan: SitePlan, rows: int) -> bool:
        return bool(plan.written) and rows >= min(self.thresholds[kind] for kind in plan.written)

    def warm_up(self) -> None:
        """Compiles what `write` launches: by a delta that adds nothing."""
        step = FusedStep(self.kernels, Segments(), {0: make_bundle([[]], self.kernels.numbers).to(self.kernels.device)})
        smallest = min(self.matrices.values(), key=lambda matrix: matrix.nbytes)
        with expected():
            self.write(step.tables.slots, 0, 0, SitePlan(reach=1), smallest)

    def write(self, slots: Tensor, slot: int, site: int, plan: SitePlan, weight: Tensor) -> Tensor:
        """→ W + Δ [out, in] of the delta in `slot`, valid until the next `write` of this shape. `slots`: a step's."""
        out = self.matrices[weight.shape[0], weight.shape[1]]
        assert weight.is_contiguous()
        assert weight.numel() < 2**31
        assert weight.dtype == out.dtype
        rank = padded(plan.reach, RANKS)
        left = torch.empty(len(weight), rank, device=weight.device)
        right = torch.empty(rank, weight.shape[1], device=weight.device)
        pool = self.kernels.pool
        for phase, made in ((2, right), (3, left), (1, out)):
            if made.numel():
                tiles = -(-made.shape[0] // ROWS) * -(-made.shape[1] // COLS)
                materialize_kernel[(tiles,)](
                    pool.byte, pool.word, pool.float, pool.field, slots, weight, left, right, made,
                    slot, site, *made.shape, rank, phase, LANES, ROWS, COLS, RANKS, num_warps=WARPS,
                )  # fmt: skip
        return out


class LongRuns(FusedStep):
    """A step whose runs may be long; `add` is that of a FusedStep, for all of them."""

    def __init__(
        self, scratch: Scratch, segments: Segments, bundles: Mapping[int, Bundle], num_rows: int | None = None
    ) -> None:
        super().__init__(scratch.kernels, segments, bundles, num_rows)
        self._scratch, self._segments, self._by_slot = scratch, segments, bundles
        self._others: dict[frozenset[int], FusedStep] = {frozenset(): self}

    def linear(self, site: int, x: Tensor, taken: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        runs = [run for run in self._segments.runs if self._is_long(run, site)]
        if not runs:
            return super().linear(site, x, taken, weight, bias)
        rows, base = x.flatten(0, -2), taken.flatten(0, -2)
        pieces, start = [], 0
        for run in runs:
            if start < run.start:
                pieces.append(F.linear(base[start : run.start], weight, bias))
            plan = self._by_slot[run.slot].plans[site]
            whole = self._scratch.write(self.tables.slots, run.slot, site, plan, weight)
            pieces.append(F.linear(rows[run.start : run.stop], whole, bias))
            start = run.stop
        if start < len(rows):
            pieces.append(F.linear(base[start:], weight, bias))
        y = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        self._without(frozenset(run.slot for run in runs)).add(site, x, y, bias)
        return y.view(*x.shape[:-1], -1)

    def _is_long(self, run: Segment, site: int) -> bool:
        bundle = self._by_slot.get(run.slot)
        return bundle is not None and self._scratch.takes(bundle.plans[site], run.stop - run.start)

    def _without(self, slots: frozenset[int]) -> FusedStep:
        if slots not in self._others:
            others = {slot: bundle for slot, bundle in self._by_slot.items() if slot not in slots}
            self._others[slots] = FusedStep(self.kernels, self._segments, others)
        return self._others[slots]
