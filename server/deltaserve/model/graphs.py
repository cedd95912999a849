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
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from deltaserve.model.attention import AttentionBatch
from deltaserve.model.delta_layers import DeltaEmbedding
from deltaserve.model.recording import GraphLimits, Recording, RecordingFailed, cuda_recorder
from deltaserve.model.step import Step, StepContext
from deltaserve_kernels.fused.bundle import Bundle, SitePlan, merged
from deltaserve_kernels.fused.site import FusedKernels, FusedStep
from deltaserve_kernels.fused.tables import Tables
from deltaserve_kernels.segments import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))  # rows of a recording, at most what is allowed
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


class _Buffers:
    """What recordings read, at fixed places; `host` is written first, and all of a type copied at once."""

    def __init__(self, limits: GraphLimits, blocks: int, device: torch.device) -> None:
        rows = limits.rows
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "write_slots": (torch.int64, (rows,)),
            "slots": (torch.int64, (limits.slots,)),
            "lengths": (torch.int32, (rows,)),
            "row_slots": (torch.int32, (rows,)),
            "rows": (torch.int32, (1 + 3 * rows,)),
            "tiles": (torch.int32, (1 + 3 * rows,)),
            "blocks": (torch.int32, (rows, blocks)),
        }
        self._host = {kind: self._flat(kind, torch.device("cpu"), device) for kind in (torch.int64, torch.int32)}
        self._device = {kind: self._flat(kind, device, device) for kind in self._host}
        self.host, self.device = self._views(self._host), self._views(self._device)

    def _flat(self, kind: torch.dtype, where: torch.device, device: torch.device) -> Tensor:
        size = sum(_aligned(shape) for own, shape in self._shapes.values() if own == kind)
        pinned = where.type == "cpu" and device.type == "cuda"
        return torch.zeros(size, dtype=kind, device=where, pin_memory=pinned)

    def _views(self, flat: Mapping[torch.dtype, Tensor]) -> dict[str, Tensor]:
        starts, views = dict.fromkeys(flat, 0), {}
        for name, (kind, shape) in self._shapes.items():
            views[name] = flat[kind][starts[kind] :][: torch.Size(shape).numel()].view(shape)
            starts[kind] += _aligned(shape)
        return views

    def fill(self, batch: AttentionBatch, tables: Tables, unused_slot: int) -> None:
        """Rows that the step lacks write to `unused_slot` and read nothing."""
        rows = len(batch.decode_lengths)
        for name, values, rest in (
            ("write_slots", batch.write_slots, unused_slot),
            ("lengths", batch.decode_lengths, 0),
            ("row_slots", tables.row_slots, -1),
        ):
            self.host[name][:rows] = values
            self.host[name][rows:] = rest
        for name, values in (("slots", tables.slots), ("rows", tables.rows), ("tiles", tables.tiles)):
            self.host[name][: len(values)] = values
        self.host["blocks"][:rows, : batch.decode_tables.shape[1]] = batch.decode_tables
        for kind, host in self._host.items():
            self._device[kind].copy_(host)  # ends before the next step writes to `host`


def _aligned(shape: tuple[int, ...]) -> int:
    """Numbers that a tensor takes, so that the next begins on 16 bytes."""
    return -(-torch.Size(shape).numel() // 4) * 4


class DecodeGraphs:
    """Stands before the layers of a model: a step that was prepared is replayed, any other runs as ever.

    `blocks`: of the longest sequence; `unused_slot`: of the KV cache, which belongs to nobody.
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
        blocks: int,
        unused_slot: int,
    ) -> None:
        self._context, self._kernels, self._limits = context, kernels, limits
        self._block_size, self._unused_slot = block_size, unused_slot
        self._record = limits.record or cuda_recorder()
        self._sizes = [*(size for size in SIZES if size < limits.rows), min(limits.rows, SIZES[-1])]
        self._body = model.base_model
        self._run_body, self._embed = self._body.forward, embedding
        device, width = kernels.device, embedding.embedding_dim
        self._buffers = _Buffers(limits, blocks, device)
        self._embeddings = torch.zeros(1, limits.rows, width, dtype=model.dtype, device=device)
        self._positions = torch.zeros(limits.rows, dtype=torch.int64, device=device)
        self._no_plans = (SitePlan(),) * num_sites
        self._union = self._no_plans  # what the deltas seen so far need
        self._known: set[int] = set()  # bundles that it covers
        self._steps: dict[Key, _RecordedStep] = {}
        self._recordings: dict[Key, Recording] = {}
        self._prepared: Key | None = None
        self.work = True
        self._body.forward = self._forward

    def prepare(self, step: Step, positions: Tensor) -> FusedStep | None:
        """Writes down what a replay reads, for the next pass; None: this step is not replayed.

        `positions` int64 [T]."""
        deltas = {run.slot: step.delta(run) for run in step.segments.runs}
        decodes = len(step.spans) == step.num_rows <= self._sizes[-1]
        if not (self.work and decodes and all(delta.fits_bundle for delta in deltas.values())):
            return None
        bundles = {slot: delta.bundle for slot, delta in deltas.items() if delta.bundle is not None}
        self._cover(bundles.values())
        tables = Tables.of(step.segments, self._kernels.places(bundles), step.num_rows)
        batch = AttentionBatch.of(step.spans, step.block_size, "cpu")
        self._buffers.fill(batch, tables, self._unused_slot)
        self._positions[: step.num_rows].copy_(positions)
        size = self._sizes[bisect_left(self._sizes, step.num_rows)]
        self._prepared = size, bool(bundles)
        return self._step(self._prepared)

    def end(self) -> None:
        self._prepared = None

    def record_all(self) -> None:
        """The base's recordings, of every size. Raises RecordingFailed."""
        for size in self._sizes:
            nobody = AttentionBatch.of((), self._block_size, "cpu"), Tables.of(Segments(), {}, 0)
            self._buffers.fill(*nobody, self._unused_slot)
            self._recording((size, False))

    def _cover(self, bundles: Iterable[Bundle]) -> None:
        """Sees to it that the union covers them. Drops the recordings with deltas where it grows."""
        new = [bundle for bundle in bundles if bundle.number not in self._known]
        if not new:
            return
        union = tuple(merged([own, *(bundle.plans[site] for bundle in new)]) for site, own in enumerate(self._union))
        if union != self._union:
            self._union = union
            for made in (self._recordings, self._steps):
                for key in [key for key in made if key[1]]:
                    del made[key]
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
            return self._run_body(*given, **named)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        embeddings = self._embed(named["input_ids"])  # [1, T, D]
        rows = embeddings.shape[1]
        self._embeddings[:, :rows].copy_(embeddings)
        recording = self._recording(self._prepared)
        recording.replay()
        return BaseModelOutputWithPast(last_hidden_state=recording.output[:, :rows])

    def _recording(self, key: Key) -> Recording:
        if key not in self._recordings:
            self._recordings[key] = self._recorded(key)
        return self._recordings[key]

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
            output: Tensor = self._run_body(**inputs, use_cache=False).last_hidden_state
            return output

        try:
            logger.info("recording a decode step of %d rows%s", size, " with deltas" if has_deltas else "")
            return self._record(run)
        except Exception as error:
            self.work = False
            raise RecordingFailed(f"a decode step cannot be recorded: {type(error).__name__}: {error}") from error
        finally:
            context.step, context.attention, context.fused = kept
