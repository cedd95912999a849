"""One step on the device: chunks → tensors → forward → a token for each chunk that ends its request's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltaserve.deltas.resident import ResidentDelta
from deltaserve.engine.sampling import Generators, Sampled, sample, token_logprobs
from deltaserve.engine.scheduler import Chunk
from deltaserve.engine.types import Request, TokenLogprob
from deltaserve.model.attention import Span
from deltaserve.model.served import ServedModel
from deltaserve.model.step import Step
from deltaserve_kernels.segments import Segments


@dataclass(frozen=True)
class ChunkResult:
    request: Request
    sampled: Sampled | None  # None: the prompt is not read to its end yet
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Runner:
    """Owns the device tensors of a step. Knows no queues and no tenants."""

    def __init__(self, model: ServedModel, slots: Sequence[ResidentDelta | None], block_size: int) -> None:
        self._model = model
        self._slots = slots
        self._block_size = block_size
        self.generators = Generators()

    def run(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        """`chunks` sorted by slot. Advances no request: the caller applies the results."""
        device = self._model.device
        ids = [token for c in chunks for token in c.request.tokens[c.start : c.start + c.num_tokens]]
        positions = [p for c in chunks for p in range(c.start, c.start + c.num_tokens)]
        wanted = [self._logit_rows(c) for c in chunks]  # of each chunk, counted from its first row
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.num_tokens)
        step = Step(
            num_rows=len(ids),
            segments=Segments.of([c.request.slot for c in chunks for _ in range(c.num_tokens)]),
            head_segments=Segments.of([c.request.slot for c, rows in zip(chunks, wanted, strict=True) for _ in rows]),
            deltas=self._slots,
            spans=[
                Span(start, start + c.num_tokens, c.start + c.num_tokens, c.request.blocks)
                for c, start in zip(chunks, starts, strict=False)
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
        return self._results(chunks, wanted, logits)

    def _logit_rows(self, chunk: Chunk) -> range:
        first = 0 if chunk.request.params.prompt_logprobs and not chunk.request.num_generated else chunk.num_tokens - 1
        return range(first if chunk.samples or not first else chunk.num_tokens, chunk.num_tokens)

    def _results(self, chunks: Sequence[Chunk], wanted: Sequence[range], logits: torch.Tensor) -> list[ChunkResult]:
        ends = []  # row of `logits` that each chunk's next token comes from
        first = 0
        prompts: list[tuple[TokenLogprob, ...]] = []
        for chunk, rows in zip(chunks, wanted, strict=True):
            own = logits[first : first + len(rows)]
            prompts.append(self._prompt_logprobs(chunk, rows, own))
            first += len(rows)
            ends.append(first - 1)
        sampling = [(end, chunk.request) for end, chunk in zip(ends, chunks, strict=True) if chunk.samples]
        sampled = iter(
            sample(logits[[end for end, _ in sampling]], [request for _, request in sampling], self.generators)
            if sampling
            else []
        )
        return [
            ChunkResult(chunk.request, next(sampled) if chunk.samples else None, prompt)
            for chunk, prompt in zip(chunks, prompts, strict=True)
        ]

    def _prompt_logprobs(self, chunk: Chunk, rows: range, logits: torch.Tensor) -> tuple[TokenLogprob, ...]:
        """Row r of the chunk tells of token start + r + 1; only tokens of the prompt are reported, each once."""
        request = chunk.request
        if not request.params.prompt_logprobs or request.num_generated:
            return ()
        told = [chunk.start + row + 1 for row in rows if chunk.start + row + 1 < len(request.prompt_ids)]
        count = request.params.logprobs or 0
        reports = token_logprobs(logits[: len(told)], [request.prompt_ids[i] for i in told], [count] * len(told))
        return tuple(report for report in reports if report is not None)
