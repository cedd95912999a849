"""Which tokens run in the next step. Plain counting: no tensors, no HTTP.

There is no prefill and no decode phase: a request has tokens that the KV cache lacks, and a step computes some,
at most `max_num_batched_tokens` over all requests. Running requests come first, then waiting ones by arrival. A
waiting request whose delta is not on the device yet is skipped, never the ones behind it. When blocks run out, the
request that was let in last gives its blocks back and is computed again later; one that all blocks together cannot hold
fails, so that it does not wait for ever before the others.

A mixture's rows run in the same step or not at all, and each counts: against seats, tokens of the step, and blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.types import DeltaGate, Request, Row
from deltaserve.errors import BadRequest, ContextLengthExceeded, DeltaServeError
from deltaserve.ids import BASE_SLOT


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + num_tokens) of a request; the last of them has a successor to be sampled if `samples`."""

    request: Request
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        return self.start + self.num_tokens == len(self.request.tokens)


class Scheduler:
    def __init__(self, blocks: BlockPool, gate: DeltaGate, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._gate = gate
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._gathering: Request | None = None  # the mixture that keeps some pins while it waits for the others

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    @property
    def num_free_seats(self) -> int:
        return max(self._max_num_seqs - sum(len(request.rows) for request in self.running), 0)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is; its blocks and its pin are free again. Harmless if it is not there."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.blocks.release(request)
        self._unpin(request.rows)
        if self._gathering is request:
            self._gathering = None

    def plan(self) -> tuple[list[Chunk], list[tuple[Request, DeltaServeError]]]:
        """The next step's chunks; and waiting requests that cannot be served, to be removed."""
        budget = self._max_num_batched_tokens
        chunks: list[Chunk] = []
        failed: list[tuple[Request, DeltaServeError]] = []
        for request in list(self.running):
            if request not in self.running:  # preempted by an earlier one of this loop
                continue
            size = min(request.num_pending, budget // len(request.rows))
            if size and self._grow_or_preempt(request, request.num_computed + size):
                chunks.append(Chunk(request, request.num_computed, size))
                budget -= size * len(request.rows)
        for request in list(self.waiting):
            size = min(request.num_pending, budget // len(request.rows))
            try:
                self._check_fits(request)
                if not size or len(request.rows) > self.num_free_seats:
                    break
                admitted = self._try_pin(request)
            except DeltaServeError as failure:
                failed.append((request, failure))
                continue
            if not admitted:
                continue
            # Room for the whole request as it stands, so that a large prompt does not evict what it just let in.
            if not self.blocks.try_grow(request, len(request.tokens)):
                if not request.num_generated:  # else it was preempted: a running request's deltas never leave
                    self._unpin(request.rows)
                break
            self.waiting.remove(request)
            self.running.append(request)
            chunks.append(Chunk(request, request.num_computed, size))
            budget -= size * len(request.rows)
        return chunks, failed

    def _check_fits(self, request: Request) -> None:
        """Raises for what could wait for ever."""
        rows = len(request.rows)
        if rows > self._max_num_seqs:
            raise BadRequest(f"a mixture of {rows} models; at most {self._max_num_seqs} sequences run", param="mixture")
        if self.blocks.blocks_for(len(request.tokens)) * rows > self.blocks.num_blocks:
            room = self.blocks.num_blocks // rows * self.blocks.block_size
            each = f" for each of its {rows} models" if rows > 1 else ""
            raise ContextLengthExceeded(f"{len(request.tokens)} tokens, but the KV cache has room for {room}{each}")

    def _try_pin(self, request: Request) -> bool:
        """Every delta of `request`, or False. One mixture at a time keeps what it got while it waits for the rest: with
        none, loads for one would evict what was loaded for the other; with two, each could wait for the other's."""
        missing = [(row, row.digest) for row in request.rows if row.digest is not None and not row.pinned]
        if request.others:
            self._gate.check_together({row.digest for row in request.rows if row.digest is not None})
        got: list[Row] = []
        for row, digest in missing:
            slot = self._gate.try_pin(digest)
            if slot is not None:
                row.slot, row.pinned = slot, True
                got.append(row)
        if len(got) == len(missing):
            if self._gathering is request:
                self._gathering = None
            return True
        if self._gathering in (None, request) and request.others:
            self._gathering = request
        else:
            self._unpin(got)
        return False

    def _unpin(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if row.pinned:
                self._gate.unpin(row.slot)
            row.slot, row.pinned = BASE_SLOT, False

    def _grow_or_preempt(self, request: Request, num_tokens: int) -> bool:
        while not self.blocks.try_grow(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request) -> None:
        """Back to the head of the queue. It keeps its tokens and its pin: a running request's delta never leaves."""
        self.running.remove(victim)
        self.blocks.release(victim)
        victim.num_computed = 0
        victim.prompt_reports.clear()
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
