"""Which tokens run in the next step. Plain counting: no tensors, no HTTP.

There is no prefill and no decode phase: a request has tokens that the KV cache lacks, and a step computes some,
at most `max_num_batched_tokens` over all requests. Running requests come first, then waiting ones by arrival. A
waiting request whose delta is not on the device yet is skipped, never the ones behind it. When blocks run out, the
request that was let in last gives its blocks back and is computed again later; one that all blocks together cannot hold
fails, so that it does not wait for ever before the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.types import DeltaGate, Request
from deltaserve.errors import ContextLengthExceeded, DeltaServeError
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

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    @property
    def num_free_seats(self) -> int:
        return max(self._max_num_seqs - len(self.running), 0)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is; its blocks and its pin are free again. Harmless if it is not there."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.blocks.release(request)
        if request.pinned:
            self._gate.unpin(request.slot)
            request.pinned = False
        request.slot = BASE_SLOT

    def plan(self) -> tuple[list[Chunk], list[tuple[Request, DeltaServeError]]]:
        """The next step's chunks, sorted by slot; and waiting requests that cannot be served, to be removed."""
        budget = self._max_num_batched_tokens
        chunks: list[Chunk] = []
        failed: list[tuple[Request, DeltaServeError]] = []
        for request in list(self.running):
            if request not in self.running:  # preempted by an earlier one of this loop
                continue
            size = min(request.num_pending, budget)
            if size and self._grow_or_preempt(request, request.num_computed + size):
                chunks.append(Chunk(request, request.num_computed, size))
                budget -= size
        for request in list(self.waiting):
            if not budget or len(self.running) >= self._max_num_seqs:
                break
            if self.blocks.blocks_for(len(request.tokens)) > self.blocks.num_blocks:
                room = self.blocks.num_blocks * self.blocks.block_size
                error = f"{len(request.tokens)} tokens, but the KV cache has room for {room}"
                failed.append((request, ContextLengthExceeded(error)))
                continue
            try:
                admitted = self._try_pin(request)
            except DeltaServeError as failure:
                failed.append((request, failure))
                continue
            if not admitted:
                continue
            size = min(request.num_pending, budget)
            # Room for the whole request as it stands, so that a large prompt does not evict what it just let in.
            if not self.blocks.try_grow(request, len(request.tokens)):
                self._unpin(request)
                break
            self.waiting.remove(request)
            self.running.append(request)
            chunks.append(Chunk(request, request.num_computed, size))
            budget -= size
        return sorted(chunks, key=lambda chunk: chunk.request.slot), failed

    def _try_pin(self, request: Request) -> bool:
        if request.digest is None or request.pinned:
            return True
        slot = self._gate.try_pin(request.digest)
        if slot is None:
            return False
        request.slot, request.pinned = slot, True
        return True

    def _unpin(self, request: Request) -> None:
        if request.pinned and not request.num_generated:
            self._gate.unpin(request.slot)
            request.slot, request.pinned = BASE_SLOT, False

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
