"""Which tokens run in the next step. Plain counting: no tensors, no HTTP.

There is no prefill and no decode phase: a request has tokens that the KV cache lacks, and a step computes some,
at most `max_num_batched_tokens` over all requests. Those that lack one token, the last sampled, come first; then
prompts, running and waiting ones, by the turn of their party (engine.fairness). A party that has more seats than one
whose prompt is read before its own lets that step stay short: its prompts go on in the next.

A waiting request whose delta is not on the device yet is skipped, never the ones behind it; the gate hears which deltas
are waited for, in turn, and may ask for a slot back from those who run. When seats or blocks run
out, a party that has fewer than its share takes those of the newest request of the party that has the most; when a
running request finds no block, the same one gives its own back. Whoever gives way is computed again later. A request
that all blocks together cannot hold fails, so that it does not wait for ever before the others.

A mixture's rows run in the same step or not at all, and each counts: against seats, tokens of the step, and blocks.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.fairness import FairQueue
from deltaserve.engine.types import DeltaGate, Request, Row
from deltaserve.errors import BadRequest, ContextLengthExceeded, DeltaServeError
from deltaserve.ids import BASE_SLOT, DeltaDigest, Slot

LATELY = 256  # steps


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + num_tokens) of a request; the last of them has a successor to be sampled if `samples`."""

    request: Request
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        return self.start + self.num_tokens == len(self.request.tokens)


@dataclass
class StepPlan:
    """A step as it is put together."""

    left: int  # tokens
    most_each: int  # tokens of one party
    full: bool = False  # the one whose turn it is lacks blocks, and nobody overtakes it
    chunks: dict[Request, Chunk] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)  # tokens of each party
    failed: dict[Request, DeltaServeError] = field(default_factory=dict)


class Scheduler:
    def __init__(
        self,
        blocks: BlockPool,
        gate: DeltaGate,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_seqs_per_tenant: int | None = None,
        max_num_batched_tokens_per_tenant: int | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.blocks = blocks
        self.waiting = FairQueue(weights or {})
        self.running: list[Request] = []
        self.seats: Counter[str] = Counter()  # rows of running requests of each party
        self.num_preemptions = 0
        self._largest: float | None = None  # see _to_give_way; None: to be found again
        self._gathering: Request | None = None  # the mixture that keeps some pins while it waits for the others
        self._gate = gate
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # so that all who decode do so in every step
        self._max_num_batched_tokens = max_num_batched_tokens
        self._most_tokens = max_num_batched_tokens_per_tenant
        self._most_seats = min(max_num_seqs_per_tenant or max_num_seqs, self._most_tokens or max_num_batched_tokens)
        self._num_plans = 0
        self._seen: dict[str, int] = {}  # party → the last plan in which it had something to do

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    @property
    def num_free_seats(self) -> int:
        return max(self._max_num_seqs - self.seats.total(), 0)

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    def remove(self, request: Request, *, sound: bool = True) -> None:
        """Takes a request out, wherever it is; its blocks and its pin are free again. Harmless if it is not there. What
        it computed is found by others if it is `sound`."""
        if request in self.running:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.blocks.release(request, sound=sound)
        self._unpin(request, request.rows)

    def plan(self) -> tuple[list[Chunk], list[tuple[Request, DeltaServeError]]]:
        """The next step's chunks; and waiting requests that cannot be served, to be removed."""
        plan = StepPlan(self._max_num_batched_tokens, self._tokens_each())
        for slot in self._gate.overdue():
            self._vacate(plan, slot)
        self._tell_gate()
        for request in self.running:
            self.blocks.publish(request)  # the last step's
        for request in [r for r in self.running if r.num_pending == 1]:
            if plan.left >= len(request.rows) and request in self.running and self._grow_or_preempt(plan, request):
                self._take(plan, request)
        pending: dict[str, deque[Request]] = {}
        for request in [*(r for r in self.running if r.num_pending > 1), *self.waiting]:
            pending.setdefault(request.party, deque()).append(request)
        turns = [(*self._turn(party), party) for party in pending]
        heapq.heapify(turns)
        least, smallest = math.inf, ""  # the fewest seats, by weight, of a party whose prompt is read in this step
        while turns and plan.left:
            *_, party = heapq.heappop(turns)
            weight = self.waiting.weight(party)
            if party != smallest and (self.seats[party] - 1) / weight >= least or not self._room(plan, party):
                continue
            if self._take_first(plan, pending[party]):
                least, smallest = min((least, smallest), (self.seats[party] / weight, party))
                heapq.heappush(turns, (*self._turn(party), party))
        return list(plan.chunks.values()), list(plan.failed.items())

    def _tell_gate(self) -> None:
        """What is waited for. The mixture that keeps pins is first, or the others would wait for them in vain."""
        gathering = [self._gathering] if self._gathering else []
        rows = [(row, row.digest) for r in (*gathering, *self.waiting) for row in r.rows if row.digest is not None]
        held = {row.digest for r in gathering for row in r.rows if row.digest is not None and row.pinned}
        self._gate.want(list(dict.fromkeys(digest for row, digest in rows if not row.pinned)), held)

    def _turn(self, party: str) -> tuple[float, int, int]:
        counter, since = self.waiting.turn(party)
        return counter, self.seats[party], since

    def _take_first(self, plan: StepPlan, pending: deque[Request]) -> bool:
        """A chunk of the first of one party's requests that can run; False if none can."""
        while pending:
            request = pending.popleft()
            if request in plan.failed or (request in self.waiting and not self._admit(plan, request, pending)):
                continue
            if request in self.running and request not in plan.chunks and plan.left >= len(request.rows):
                self._take(plan, request)
                return True
        return False

    def _room(self, plan: StepPlan, party: str) -> int:
        return min(plan.left, plan.most_each - plan.read[party])

    def _tokens_each(self) -> int:
        """Of a step's tokens, those that one party may have: an even part among all that asked for something lately, so
        that a step is not long for one's sake when another's request comes; a 16th at least, or what the settings
        say."""
        self._num_plans += 1
        for party in {*self.seats, *self.waiting.parties}:
            self._seen[party] = self._num_plans
        self._seen = {party: at for party, at in self._seen.items() if self._num_plans - at < LATELY}
        even = self._max_num_batched_tokens // min(max(len(self._seen), 1), 16)
        return self._most_tokens or max(even, self._most_seats)

    def _take(self, plan: StepPlan, request: Request) -> None:
        """What was computed before and given back is not charged again."""
        rows = len(request.rows)
        most = max(self._room(plan, request.party) // rows, 1)
        chunk = Chunk(request, request.num_computed, min(request.num_pending, most))
        plan.left -= chunk.num_tokens * rows
        plan.read[request.party] += chunk.num_tokens * rows
        plan.chunks[request] = chunk
        end = min(chunk.start + chunk.num_tokens, len(request.prompt_ids))
        new = max(end - max(chunk.start, request.num_charged), 0)
        request.num_charged += new
        self.waiting.charge(request.party, new * rows, chunk.samples * rows)

    def _admit(self, plan: StepPlan, request: Request, behind: deque[Request]) -> bool:
        """Lets a waiting request in. Where it lacks a seat or blocks, those of its party `behind` it wait too."""
        try:
            self._check_fits(request)
        except DeltaServeError as failure:
            plan.failed[request] = failure
            return False
        rows = len(request.rows)
        lacks_seats = self.seats[request.party] + rows > self._most_seats
        if plan.full or lacks_seats or plan.left < rows or self._to_give_way(request.party, rows, 0) is None:
            behind.clear()
            return False
        had_pins = [row for row in request.rows if row.pinned]
        if not self._try_pin(plan, request):
            return False
        # Room for the whole request as it stands, so that a large prompt does not evict what it just let in.
        victims = self._to_give_way(request.party, rows, self.blocks.num_lacking(request))
        for victim in victims or ():
            self._preempt(plan, victim)
        if victims is None or not self.blocks.try_start(request):
            self._unpin(request, [row for row in request.rows if row not in had_pins])
            plan.full = True
            behind.clear()
            return False
        if request.num_cached is None:
            request.num_cached = request.num_computed
        self.waiting.remove(request)
        self.running.append(request)
        self.seats[request.party] += rows
        self._largest = None
        return True

    def _check_fits(self, request: Request) -> None:
        """Raises for what could wait for ever."""
        rows, most = len(request.rows), min(self._max_num_seqs, self._most_seats)
        if rows > most:
            raise BadRequest(f"a mixture of {rows} models; at most {most} sequences run", param="mixture")
        if self.blocks.blocks_for(len(request.tokens)) * rows > self.blocks.num_blocks:
            room = self.blocks.num_blocks // rows * self.blocks.block_size
            each = f" for each of its {rows} models" if rows > 1 else ""
            raise ContextLengthExceeded(f"{len(request.tokens)} tokens, but the KV cache has room for {room}{each}")
        if request.others:
            self._gate.check_together({row.digest for row in request.rows if row.digest is not None})

    def _to_give_way(self, party: str, num_seats: int, num_blocks: int) -> list[Request] | None:
        """Running requests whose seats and blocks would give `party` that many more: of parties that were served more
        and then still have as many seats as it, by weight. None if that cannot be had."""
        if self.num_free_seats >= num_seats and self.blocks.num_free >= num_blocks:
            return []
        queue, share = self.waiting, (self.seats[party] + num_seats) / self.waiting.weight(party)
        if self._largest is None:  # what the party with the most seats would still have without one of them
            self._largest = max(((n - 1) / queue.weight(other) for other, n in self.seats.items()), default=0.0)
        if self._largest < share:
            return None
        victims, seats = list[Request](), self.seats.copy()
        served_more = [other for other in seats if seats[other] and queue.counter(other) > queue.counter(party)]
        free_seats, free_blocks = self.num_free_seats, self.blocks.num_free
        while free_seats < num_seats or free_blocks < num_blocks:
            most = max(served_more, key=lambda other: (seats[other] - 1) / queue.weight(other), default=party)
            victim = next((r for r in reversed(self.running) if r.party == most and r not in victims), None)
            if most == party or victim is None:
                return None
            seats[most] -= len(victim.rows)
            if seats[most] / queue.weight(most) < share:
                return None
            victims.append(victim)
            free_seats += len(victim.rows)
            free_blocks += sum(len(row.blocks) for row in victim.rows)
        return victims

    def _try_pin(self, plan: StepPlan, request: Request) -> bool:
        """Every delta of `request`, or False. One mixture at a time keeps what it got while it waits for the rest: with
        none, loads for one would evict what was loaded for the other; with two, each could wait for the other's.
        Whoever waits for a delta that failed fails with it."""
        missing = [(row, row.digest) for row in request.rows if row.digest is not None and not row.pinned]
        gathers = bool(request.others) and self._gathering in (None, request)
        if request.others and not gathers and not all(self._gate.is_ready(digest) for _, digest in missing):
            return False  # a pin for nothing would cost the one that gathers its turn
        got: list[Row] = []
        for row, digest in missing:
            try:
                slot = self._gate.try_pin(digest)
            except DeltaServeError as failure:
                plan.failed |= {other: failure for other in self.waiting if _waits_for(other, digest)}
                return False
            if slot is not None:
                row.slot, row.pinned = slot, True
                got.append(row)
        if len(got) == len(missing):
            if self._gathering is request:
                self._gathering = None
            return True
        if gathers:
            self._gathering = request
        else:
            self._unpin(request, got)
        return False

    def _unpin(self, request: Request, rows: Iterable[Row]) -> None:
        for row in rows:
            if row.pinned:
                self._gate.unpin(row.slot)
            row.slot, row.pinned = BASE_SLOT, False
        if self._gathering is request and not any(row.pinned for row in request.rows):
            self._gathering = None

    def _grow_or_preempt(self, plan: StepPlan, request: Request) -> bool:
        while not self.blocks.try_grow(request, len(request.tokens)):
            most = max(self.seats[r.party] / self.waiting.weight(r.party) for r in self.running)
            victim = next(
                r for r in reversed(self.running) if self.seats[r.party] / self.waiting.weight(r.party) == most
            )
            self._preempt(plan, victim)
            if victim is request:
                return False
        return True

    def _preempt(self, plan: StepPlan, victim: Request) -> None:
        """Back to the head of its queue. It keeps its tokens and its pin."""
        chunk = plan.chunks.pop(victim, None)
        if chunk is not None:
            rows = len(victim.rows)
            plan.left += chunk.num_tokens * rows
            plan.read[victim.party] -= chunk.num_tokens * rows
            self.waiting.charge(victim.party, 0, -chunk.samples * rows)
        self._leave(victim)
        self.blocks.release(victim)
        victim.num_computed = 0
        victim.prompt_reports.clear()
        self.waiting.put_back(victim)
        self.num_preemptions += 1

    def _vacate(self, plan: StepPlan, slot: Slot) -> None:
        """Its requests wait for their delta again."""
        for request in [r for r in self if any(row.pinned and row.slot == slot for row in r.rows)]:
            if request in self.running:
                self._preempt(plan, request)
            self._unpin(request, request.rows)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._largest = None
        self.seats[request.party] -= len(request.rows)
        if not self.seats[request.party]:
            del self.seats[request.party]


def _waits_for(request: Request, digest: DeltaDigest) -> bool:
    return any(row.digest == digest and not row.pinned for row in request.rows)
