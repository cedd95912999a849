"""A scheduler, requests that count tokens, and a gate that says yes, not yet or no."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.scheduler import Chunk, Scheduler
from deltaserve.engine.types import Request, Row, SamplingParams
from deltaserve.errors import BadRequest, DeltaLoadFailed
from deltaserve.ids import DeltaDigest, RequestId, Slot

_serial = itertools.count()


class Mute:
    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:  # noqa: ARG002
        return "", None

    def finish(self) -> str:
        return ""


@dataclass
class Gate:
    """`slots`: what is on the device. `broken`: what fails, once for each entry."""

    slots: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    pins: Counter[int] = field(default_factory=Counter)
    most: int = 99  # that can be on the device at the same time
    wanted: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    late: list[int] = field(default_factory=list)  # slots to be left

    def try_pin(self, digest: DeltaDigest) -> Slot | None:
        if digest in self.broken:
            self.broken.remove(digest)
            raise DeltaLoadFailed(f"{digest} is broken")
        if digest not in self.slots:
            return None
        self.pins[self.slots[digest]] += 1
        return Slot(self.slots[digest])

    def unpin(self, slot: Slot) -> None:
        self.pins[slot] -= 1
        assert self.pins[slot] >= 0

    def is_ready(self, digest: DeltaDigest) -> bool:
        return digest in self.slots or digest in self.broken

    def check_together(self, digests: Collection[DeltaDigest]) -> None:
        if len(digests) > self.most:
            raise BadRequest("too many", param="mixture")

    def want(self, digests: Sequence[DeltaDigest], held: Collection[DeltaDigest] = ()) -> None:
        self.wanted, self.held = list(digests), set(held)

    def overdue(self) -> list[Slot]:
        late, self.late = self.late, []
        return [Slot(slot) for slot in late]


def make_request(num_tokens: int = 4, digest: str | None = None, *others: str | None) -> Request:
    digests = [None if name is None else DeltaDigest(name) for name in (digest, *others)]
    return Request(
        id=RequestId(f"r{next(_serial)}"),
        digest=digests[0],
        others=tuple(Row(digest=other) for other in digests[1:]),
        prompt_ids=list(range(num_tokens)),
        params=SamplingParams(max_tokens=100),
        eos_ids=frozenset(),
        vocab_size=1000,
        sink=Mute(),
        emit=lambda event: None,
    )


def make(
    *requests: Request, gate: Gate | None = None, blocks: int = 100, size: int = 4, seats: int = 8, budget: int = 16
) -> Scheduler:
    scheduler = Scheduler(BlockPool(blocks, size), gate or Gate(), max_num_seqs=seats, max_num_batched_tokens=budget)
    for request in requests:
        scheduler.add(request)
    return scheduler


def advance(chunks: list[Chunk]) -> None:
    for chunk in chunks:
        sampled = chunk.samples
        chunk.request.num_computed += chunk.num_tokens
        if sampled:
            chunk.request.tokens.append(7)


def spans(chunks: list[Chunk]) -> dict[str, tuple[int, int]]:
    return {chunk.request.id: (chunk.start, chunk.num_tokens) for chunk in chunks}


def plan(scheduler: Scheduler) -> list[Chunk]:
    chunks, failed = scheduler.plan()
    assert not failed
    return chunks
