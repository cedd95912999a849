"""What one forward pass tells the layers. Built by the runner, read by every delta-aware layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.deltas.resident import ResidentDelta
from deltaserve.model.attention import AttentionBatch, KvCache, Span
from deltaserve_kernels.segments import Segment, Segments

if TYPE_CHECKING:
    from deltaserve_kernels.fused.site import FusedStep
    from deltaserve_kernels.paged_attention.fused import PagedAttention


@dataclass(frozen=True)
class Step:
    """Rows are sorted by slot. `deltas[slot]` is what the slot holds during this step."""

    num_rows: int
    segments: Segments  # of the rows
    head_segments: Segments  # of the rows whose logits are asked for
    deltas: Sequence[ResidentDelta | None]
    spans: Sequence[Span]  # one after the other, all rows
    block_size: int
    device: torch.device = torch.device("cpu")

    @cached_property
    def attention(self) -> AttentionBatch:
        return AttentionBatch.of(self.spans, self.block_size, self.device)

    def cut(self, start: int, stop: int) -> Step:
        """Its rows [start, stop) as a step of their own, without logits; rows of a sequence come in order."""
        stop = min(stop, self.num_rows)
        if start == 0 and stop == self.num_rows:
            return self
        runs = (
            replace(r, start=max(r.start, start) - start, stop=min(r.stop, stop) - start) for r in self.segments.runs
        )
        spans = [
            Span(max(s.start, start) - start, min(s.stop, stop) - start, s.length - max(s.stop - stop, 0), s.blocks)
            for s in self.spans
            if s.start < stop and s.stop > start
        ]
        segments = Segments(tuple(run for run in runs if run.start < run.stop))
        return replace(self, num_rows=stop - start, segments=segments, head_segments=Segments(), spans=spans)

    def delta(self, run: Segment) -> ResidentDelta:
        """The delta of a run. Raises LookupError for an empty slot: never the base model instead."""
        delta = self.deltas[run.slot]
        if delta is None:
            raise LookupError(f"slot {run.slot} is empty, and rows {run.start}…{run.stop} name it")
        return delta


@dataclass
class StepContext:
    """The one mutable thing that the layers share: the step that runs, and the KV cache."""

    cache: KvCache
    paged: PagedAttention | None = None  # Triton's kernel, where it serves
    step: Step | None = field(default=None)
    attention: AttentionBatch | None = field(default=None)
    fused: FusedStep | None = field(default=None)  # what Triton's kernels read of the step's rows
    fused_head: FusedStep | None = field(default=None)  # … of the rows whose logits are asked for
    absent: Tensor | None = field(default=None)  # bool, of the logits: tokens that a row's model lacks

    @property
    def current(self) -> Step:
        assert self.step is not None, "a layer was called outside a step"
        return self.step

    @property
    def batch(self) -> AttentionBatch:
        """The step's, built when the first layer reads it; a recorded step's is given."""
        return self.current.attention if self.attention is None else self.attention
