"""One step on the device: chunks → tensors → forward → a token for each chunk that ends its request's tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.deltas.resident import ResidentDelta
from deltaserve.engine.mixtures import combine
from deltaserve.engine.sampling import Generators, Sampled, sample, token_logprobs
from deltaserve.engine.scheduler import Chunk
from deltaserve.engine.types import Guide, Request, TokenLogprob
from deltaserve.errors import DeltaServeError, GrammarError
from deltaserve.model.attention import Span
from deltaserve.model.served import ServedModel
from deltaserve.model.step import Step
from deltaserve_kernels.segments import Segments

GUIDE_WAIT_S = 0.02  # a row whose mask is later than this runs again in the next step


@dataclass(frozen=True)
class ChunkResult:
    request: Request
    sampled: Sampled | None  # None: the prompt is not read to its end yet, or the grammar is not ready
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: DeltaServeError | None = None
    row_logprobs: tuple[float, ...] = ()  # of the sampled token under each model of a mixture, where it needs them


class Runner:
    """Owns the device tensors of a step. Knows no queues and no tenants."""

    def __init__(self, model: ServedModel, slots: Sequence[ResidentDelta | None], block_size: int) -> None:
        self._model = model
        self._slots = slots
        self._block_size = block_size
        self.generators = Generators()

    def run(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        """Advances no request: the caller applies the results, which come in the order of `chunks`."""
        device = self._model.device
        pieces = sorted(((row, c) for c in chunks for row in c.request.rows), key=lambda piece: piece[0].slot)
        ids = [token for _, c in pieces for token in c.request.tokens[c.start : c.start + c.num_tokens]]
        positions = [p for _, c in pieces for p in range(c.start, c.start + c.num_tokens)]
        wanted = [self._logit_rows(c) for _, c in pieces]  # of each piece, counted from its first row
        starts = [0]
        for _, chunk in pieces:
            starts.append(starts[-1] + chunk.num_tokens)
        step = Step(
            num_rows=len(ids),
            segments=Segments.of([row.slot for row, c in pieces for _ in range(c.num_tokens)]),
            head_segments=Segments.of([row.slot for (row, _), own in zip(pieces, wanted, strict=True) for _ in own]),
            deltas=self._slots,
            spans=[
                Span(start, start + c.num_tokens, c.start + c.num_tokens, row.blocks)
                for (row, c), start in zip(pieces, starts, strict=False)
            ],
            block_size=self._block_size,
            device=device,
        )
        rows = [start + row for start, own in zip(starts, wanted, strict=False) for row in own]
        logits = self._model.forward(
            step,
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(rows, dtype=torch.int64, device=device),
        )
        parts = torch.split(logits, [len(own) for own in wanted])
        by_row = {row: part for (row, _), part in zip(pieces, parts, strict=True)}
        return self._results(chunks, [[by_row[row] for row in chunk.request.rows] for chunk in chunks])

    def _logit_rows(self, chunk: Chunk) -> range:
        first = 0 if chunk.request.params.prompt_logprobs and not chunk.request.num_generated else chunk.num_tokens - 1
        return range(first if chunk.samples or not first else chunk.num_tokens, chunk.num_tokens)

    def _results(self, chunks: Sequence[Chunk], logits: Sequence[Sequence[Tensor]]) -> list[ChunkResult]:
        """`logits[i][j]` float32 [wanted rows, V]: of chunk i by its request's j-th model."""
        combined = [mixed(chunk.request, own) for chunk, own in zip(chunks, logits, strict=True)]
        errors: dict[Request, DeltaServeError] = {}
        rows: dict[Request, Tensor] = {}
        deadline_s = time.monotonic() + GUIDE_WAIT_S
        for chunk, own in zip(chunks, combined, strict=True):
            try:
                if chunk.samples and _is_ready(chunk.request.guide, deadline_s):
                    rows[chunk.request] = own[-1]
            except GrammarError as error:
                errors[chunk.request] = error
        sampled = dict(
            zip(rows, sample(_together([*rows.values()]), [*rows], self.generators), strict=True) if rows else ()
        )
        return [
            ChunkResult(
                chunk.request,
                sampled.get(chunk.request),
                self._prompt_logprobs(chunk, own),
                errors.get(chunk.request),
                _row_logprobs(chunk.request, sampled.get(chunk.request), by_model),
            )
            for chunk, own, by_model in zip(chunks, combined, logits, strict=True)
        ]

    def _prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> tuple[TokenLogprob, ...]:
        """Row r of the chunk tells of token start + r + 1; only tokens of the prompt are reported, each once."""
        request = chunk.request
        if not request.params.prompt_logprobs or request.num_generated:
            return ()
        following = [chunk.start + row + 1 for row in self._logit_rows(chunk)]
        told = [place for place in following if place < len(request.prompt_ids)]
        count = request.params.logprobs or 0
        reports = token_logprobs(logits[: len(told)], [request.prompt_ids[i] for i in told], [count] * len(told))
        return tuple(report for report in reports if report is not None)


def _together(rows: list[Tensor]) -> Tensor:
    """[R, V] of rows [V]; a view where they lie at even distances, as they do unless models are mixed."""
    first, starts = rows[0], [row.storage_offset() for row in rows]
    step = starts[1] - starts[0] if len(rows) > 1 else len(first)
    is_even = step > 0 and starts == list(range(starts[0], starts[0] + step * len(rows), step))
    storage = first.untyped_storage().data_ptr()
    if is_even and all(row.untyped_storage().data_ptr() == storage and row.stride() == (1,) for row in rows):
        return first.as_strided((len(rows), len(first)), (step, 1))
    return torch.stack(rows)


def _is_ready(guide: Guide | None, deadline_s: float) -> bool:
    """Raises GrammarError."""
    if guide is None:
        return True
    if not guide.is_ready(deadline_s):
        return False
    guide.allowed()
    return True


def mixed(request: Request, logits: Sequence[Tensor]) -> Tensor:
    """The logits [R, V] of a request: its model's own, or its models' together."""
    if request.mixture is None:
        return logits[0]
    return combine(request.mixture, logits, [row.logprob for row in request.rows])


def _row_logprobs(request: Request, sampled: Sampled | None, logits: Sequence[Tensor]) -> tuple[float, ...]:
    if sampled is None or request.mixture is None or not request.mixture.alpha:
        return ()
    return tuple(float(own[-1].log_softmax(-1)[sampled.token_id]) for own in logits)
