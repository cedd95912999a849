"""Decode steps recorded once and replayed: the host launches one graph instead of hundreds of kernels.

    recorded    all layers between embedding and head, for steps in which each sequence has one row
    not         embedding, head, sampling: a few launches; steps that read prompts

A recording is made for a padded number of rows, and for the kinds of launches that the deltas seen so far need. Whose
rows they are, which deltas there are and where, which blocks a sequence has: all of it is read from memory at fixed
places, written before each replay. So deltas and requests come and go between replays; only a delta with a new kind of
part has the recordings with deltas made again, each when it is next needed.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from deltaserve.deltas.resident import ResidentDelta
from deltaserve.model.attention import AttentionBatch
from deltaserve.model.delta_layers import DeltaEmbedding
from deltaserve.model.recording import GraphLimits, Recording, RecordingFailed, cuda_recorder, refusing_waits
from deltaserve.model.step import Step, StepContext
from deltaserve.model.step_buffers import StepBuffers
from deltaserve_kernels.fused.bundle import Bundle, SitePlan, merged
from deltaserve_kernels.fused.site import FusedKernels, FusedStep
from deltaserve_kernels.fused.tables import Tables
from deltaserve_kernels.segments import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))  # rows of a recording, at most what is allowed
TOLERANCE = 0.02  # of a replay, relative: products may be chosen otherwise
Key: TypeAlias = tuple[int, bool]  # rows, and whether there are deltas
MOST_KNOWN = 2**14  # bundles that are remembered as covered


class _RecordedStep(FusedStep):
    """A step whose tables and launches are given."""

    def __init__(self, kernels: FusedKernels, tables: Tables, plans: Sequence[SitePlan]) -> None:
        self.kernels, self.tables = kernels, tables
        self._input = None
        self._plans = [(plan, sorted(plan.launches, key=lambda launch: launch.order)) for plan in plans]

    def plan(self, site: int) -> tuple[SitePlan, Sequence[Any]]:
        return self._plans[site]


class DecodeGraphs:
    """Stands before the layers of a model: a step that was prepared is replayed, any other runs as ever.

    `unused_slot`: of the KV cache, which belongs to nobody; `long_runs`: rows of one delta from which its weights are
    written out, which is not recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        embedding: DeltaEmbedding,
        context: StepContext,
        kernels: FusedKernels,
        limits: GraphLimits,
        *,
        num_sites: int,
        block_size: int,
        unused_slot: int,
        long_runs: int | None = None,
    ) -> None:
        self._context, self._kernels, self._long_runs = context, kernels, long_runs
        self._block_size, self._unused_slot, self._longest = block_size, unused_slot, limits.positions
        self._record = limits.record or cuda_recorder()
        self._sizes: list[int] = [*(size for size in SIZES if size < limits.rows), min(limits.rows, SIZES[-1])]
        device, rows = kernels.device, self._sizes[-1]
        self._buffers = StepBuffers(rows, limits.slots, -(-limits.positions // block_size), device)
        width = embedding.embedding_dim
        self._embeddings = torch.arange(rows * width, device=device).cos().view(1, rows, width).to(model.dtype)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._no_plans = (SitePlan(),) * num_sites
        self._union = self._no_plans  # what recordings with deltas launch
        self._known: set[int] = set()  # bundles that it covers
        self._steps: dict[Key, _RecordedStep] = {}
        self._recordings: dict[Key, Recording] = {}
        self._refused: set[Key] = set()
        self._prepared: Key | None = None
        self._output: Callable[..., Any] = dict  # the type of what the layers answer
        self.replays = 0
        self.misses = 0  # decode steps that ran kernel by kernel
        self.work = True
        self._layers = model.get_decoder()  # type: ignore[no-untyped-call]
        self._run_layers, self._embed = self._layers.forward, embedding
        self._layers.forward = self._forward

    def prepare(self, step: Step, positions: Tensor) -> FusedStep | None:
        """Writes down what a replay reads, for the next pass; None: this step is not replayed.

        `positions` int64 [T]."""
        prepared = self._fill(step, positions)
        if prepared is None and len(step.spans) == step.num_rows:
            self.misses += 1
        return prepared

    def _fill(self, step: Step, positions: Tensor) -> FusedStep | None:
        size = self._size(step)
        deltas = {run.slot: step.delta(run) for run in step.segments.runs}
        if size is None or not all(delta.fits_bundle for delta in deltas.values()):
            return None
        bundles = {slot: delta.bundle for slot, delta in deltas.items() if delta.bundle is not None}
        self._cover(bundles.values(), step.deltas)
        key = size, bool(bundles)
        if key in self._refused:
            return None
        tables = Tables.of(step.segments, self._kernels.places(bundles), step.num_rows)
        self._buffers.fill(step.spans, step.block_size, tables, self._unused_slot)
        self._positions[: step.num_rows].copy_(positions)
        self._prepared = key
        return self._step(key)

    def _size(self, step: Step) -> int | None:
        """Rows of the recording that serves the step."""
        if not self.work or not len(step.spans) == step.num_rows <= self._sizes[-1]:
            return None
        if any(span.length > self._longest for span in step.spans):
            return None
        if self._long_runs and any(run.stop - run.start >= self._long_runs for run in step.segments.runs):
            return None
        return self._sizes[bisect_left(self._sizes, step.num_rows)]

    def end(self) -> None:
        self._prepared = None

    def record_all(self) -> None:
        """The base's recordings, of every size, the largest first: the others find room in its memory. Raises
        RecordingFailed."""
        if not self._context.cache.fits(self._context.paged):
            raise RecordingFailed("a decode step cannot be recorded: its heads are too large for Triton's kernel")
        self._buffers.fill((), self._block_size, Tables.of(Segments(), {}, 0), self._unused_slot)
        with refusing_waits(self._kernels.device):
            for size in reversed(self._sizes):
                self._recordings[size, False] = self._recorded((size, False))
        for recording in self._recordings.values():
            self._verify(recording)

    def _cover(self, bundles: Iterable[Bundle], resident: Sequence[ResidentDelta | None]) -> None:
        """Sees to it that the union covers them. Where it grows, recordings with deltas are dropped, and what only
        deltas that are gone needed, once it is half of all."""
        new = [bundle for bundle in bundles if bundle.number not in self._known]
        if not new:
            return
        grown = _together([self._union, *(bundle.plans for bundle in new)])
        if grown != self._union:
            present = [delta.bundle for delta in resident if delta is not None and delta.bundle is not None]
            needed = _together([bundle.plans for bundle in present])
            self._union = needed if 2 * _launches(needed) <= _launches(grown) else grown
            self._known = {bundle.number for bundle in present}
            for made in (self._recordings, self._steps):
                for key in [key for key in made if key[1]]:
                    del made[key]
            self._refused.clear()
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        self._known.update(bundle.number for bundle in new)

    def _step(self, key: Key) -> _RecordedStep:
        if key not in self._steps:
            size, has_deltas = key
            views = self._buffers.device
            tables = Tables(views["slots"], views["rows"], views["tiles"], views["row_slots"][:size])
            self._steps[key] = _RecordedStep(self._kernels, tables, self._union if has_deltas else self._no_plans)
        return self._steps[key]

    def _forward(self, *given: Any, **named: Any) -> Any:
        if self._prepared is None:
            return self._run_layers(*given, **named)
        embeddings = self._embed(named["input_ids"] if "input_ids" in named else given[0])  # [1, T, D]
        rows = embeddings.shape[1]
        self._embeddings[:, :rows].copy_(embeddings)
        if self._prepared not in self._recordings:
            self._recordings[self._prepared] = self._new(self._prepared)
        recording = self._recordings[self._prepared]
        recording.replay()
        self.replays += 1
        return self._output(last_hidden_state=recording.output[:, :rows])

    def _new(self, key: Key) -> Recording:
        """Of a step that is served. Raises RecordingFailed, once for a key and union."""
        try:
            recording = self._recorded(key)
            self._verify(recording)
            return recording
        except RecordingFailed:
            self._refused.add(key)
            raise

    def _recorded(self, key: Key) -> Recording:
        size, has_deltas = key
        context, views = self._context, self._buffers.device
        kept = context.step, context.attention, context.fused
        context.step = Step(size, Segments(), Segments(), (), (), self._block_size, self._kernels.device)
        context.attention = AttentionBatch(
            write_slots=views["write_slots"][:size],
            decode_rows=None,
            decode_tables=views["blocks"][:size],
            decode_lengths=views["lengths"][:size],
            longest=0,
            block_size=self._block_size,
        )
        context.fused = self._step(key)

        def run() -> Tensor:
            inputs = {"inputs_embeds": self._embeddings[:, :size], "position_ids": self._positions[None, :size]}
            answer = self._run_layers(**inputs, use_cache=False)
            self._output = type(answer)
            hidden: Tensor = answer.last_hidden_state
            return hidden

        try:
            logger.info("recording a decode step of %d rows%s", size, " with deltas" if has_deltas else "")
            return self._record(run)
        except Exception as error:
            raise RecordingFailed(f"a decode step cannot be recorded: {type(error).__name__}: {error}") from error
        finally:
            context.step, context.attention, context.fused = kept

    @staticmethod
    def _verify(recording: Recording) -> None:
        """Does a replay give what the step gave when it ran? Raises RecordingFailed."""
        recording.replay()
        found, wanted = (torch.nan_to_num(x.float()) for x in (recording.output, recording.first))
        distance, size = float((found - wanted).norm()), float(wanted.norm())
        if not distance <= TOLERANCE * size:
            raise RecordingFailed(
                f"a recorded decode step answers otherwise than one that runs ({distance:.1e} of {size:.1e})"
            )


def _together(plans: Sequence[Sequence[SitePlan]]) -> tuple[SitePlan, ...]:
    return tuple(merged(of_site) for of_site in zip(*plans, strict=True))


def _launches(plans: Sequence[SitePlan]) -> int:
    return sum(len(plan.launches) for plan in plans)
