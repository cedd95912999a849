"""Where deltas are: disk → host → device, on demand, in the order in which the queue needs them.

One thread reads from disk to host (verify the file, spell out masks, pack), ahead of need: what waits is read although
every slot is in use. Another copies from host to device; on a CPU both are the same memory, and a delta is there at
once. The engine's thread asks with `try_pin` and never waits. Slots are the device's places; a pinned one stays.

What goes when room is needed: what is neither in use nor waited for, by bytes and by what it cost to bring
(deltas.eviction). Where everything is in use, the first that waits closes the slot whose delta came longest ago and has
had its quantum: no new request gets in there, and the slot changes hands when the last one has left it. After
`max_wait_s` it does not wait for them: `overdue` names the slot, and the engine puts its requests back.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

import torch

from deltaserve.deltas.eviction import GreedyDual
from deltaserve.deltas.limits import Limits
from deltaserve.deltas.resident import Load, ResidentDelta, read_delta
from deltaserve.errors import BadRequest, DeltaLoadFailed, StoreUnavailable
from deltaserve.ids import BASE_SLOT, DeltaDigest, Slot

logger = logging.getLogger(__name__)
Failure: TypeAlias = DeltaLoadFailed | StoreUnavailable
AMORTISE = 10  # a delta keeps its slot for this many times what it took to bring it


class Residency:
    """Implements engine.types.DeltaGate. Thread-safe; `slots` is read by the runner during a step. `on_loaded` hears of
    every move: the tier it came from (disk or host) and the seconds it took."""

    def __init__(
        self,
        file_of: Callable[[DeltaDigest], AbstractContextManager[Path]],
        device: torch.device,
        limits: Limits,
        *,
        load: Load = ResidentDelta.load,
        on_ready: Callable[[], None],
        on_loaded: Callable[[str, float], None] = lambda tier, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots: list[ResidentDelta | None] = [None] * limits.device_deltas
        self._file_of = file_of
        self._device = device
        self._limits = limits
        self._load = load
        self._on_ready = on_ready
        self._on_loaded = on_loaded
        self._clock = clock
        self._lock = threading.RLock()
        self._slot_of: dict[DeltaDigest, Slot] = {}  # what is on the device
        self._arriving: dict[DeltaDigest, tuple[Slot, int]] = {}  # what is being copied there, with its bytes
        self._host_tier: dict[DeltaDigest, ResidentDelta] = {}
        self._on_device, self._on_host = GreedyDual[DeltaDigest](), GreedyDual[DeltaDigest]()
        self._costs: dict[tuple[str, DeltaDigest], float] = {}  # seconds of the last move from a tier
        self._sizes: dict[DeltaDigest, int] = {}  # bytes of what was read once
        self._pins = [0] * limits.device_deltas
        self._placed_s = [0.0] * limits.device_deltas  # when each slot's delta came
        self._closed: set[Slot] = set()
        self._held: Collection[DeltaDigest] = ()
        self._wanted: dict[DeltaDigest, float] = {}  # what is waited for and since when, the first in turn first
        self._kept: dict[DeltaDigest, None] = {}
        self._prewarmed: dict[DeltaDigest, None] = {}  # to be brought once, where there is room
        self._reading: DeltaDigest | None = None
        self._failures: dict[DeltaDigest, Failure] = {}  # not told yet
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="delta-reader")
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="delta-copier")

    def try_pin(self, digest: DeltaDigest) -> Slot | None:
        """The delta's slot with one more pin; None while it loads, waits for a slot, or is about to leave its own.
        Raises DeltaLoadFailed or StoreUnavailable once for a load that failed; the next call tries again."""
        with self._lock:
            if (failure := self._failures.pop(digest, None)) is not None:
                self._wanted.pop(digest, None)  # all that waited end with it: it is not read again for them
                raise failure
            self._wanted.setdefault(digest, self._clock())
            if digest not in self._slot_of:
                self._settle()
            slot = self._slot_of.get(digest)
            if slot is None or slot in self._closed:
                return None
            del self._wanted[digest]
            self._use_on_device(digest)
            self._pins[slot] += 1
            return slot

    def unpin(self, slot: Slot) -> None:
        with self._lock:
            self._pins[slot] -= 1
            assert self._pins[slot] >= 0, f"slot {slot} was unpinned more often than pinned"
            if not self._pins[slot]:
                self._settle()

    def is_ready(self, digest: DeltaDigest) -> bool:
        """Would `try_pin` have an answer now, a slot or a failure?"""
        with self._lock:
            return digest in self._failures or self._slot_of.get(digest, BASE_SLOT) not in {BASE_SLOT, *self._closed}

    def check_together(self, digests: Collection[DeltaDigest]) -> None:
        """Raises BadRequest if these can never be on the device at once; a size is known after one load."""
        with self._lock:
            needed = {digest: self._sizes.get(digest, 0) for digest in (*digests, *self._kept)}
        size, limit = sum(needed.values()), self._limits.device_bytes or math.inf
        if len(needed) > len(self.slots) or (len(needed) > 1 and size > limit):
            raise BadRequest(f"{len(set(digests))} models do not fit on the device at once", param="mixture")

    def want(self, digests: Sequence[DeltaDigest], held: Collection[DeltaDigest] = ()) -> None:
        """All that is waited for, the first in turn first; what is not named is not waited for any more. `held` is
        pinned by a request that waits for the first of them: those slots are not closed."""
        with self._lock:
            now, self._held = self._clock(), held
            self._wanted = {digest: self._wanted.get(digest, now) for digest in digests}
            self._settle()

    def overdue(self) -> list[Slot]:
        """Slots to be left now: the first that waits has waited for `max_wait_s`, and they were kept as long."""
        with self._lock:
            first, now, patience = self._first_without_room(), self._clock(), self._limits.max_wait_s
            if first is None or now - self._wanted.get(first, now) < patience:
                return []
            return [slot for slot in sorted(self._closed) if now - self._placed_s[slot] >= patience]

    def keep(self, digest: DeltaDigest) -> None:
        """Loads a delta as soon as there is room and keeps it on the device, used or not, until `let_go`. Raises
        BadRequest if no slot were left for all others."""
        with self._lock:
            if digest not in self._kept and len(self._kept) + 1 >= len(self.slots):
                raise BadRequest(f"the device keeps {len(self._kept)} deltas, and one of its slots must stay free")
            self._kept[digest] = None
            self._settle()

    def let_go(self, digest: DeltaDigest) -> None:
        """Takes `keep` back. Harmless for what is not kept."""
        with self._lock:
            self._kept.pop(digest, None)
            self._settle()

    def prewarm(self, digest: DeltaDigest) -> None:
        """Brings a delta to the device, once, after those that are waited for and if there is room. Returns at once."""
        with self._lock:
            self._prewarmed[digest] = None
            self._settle()

    def discard(self, digests: Sequence[DeltaDigest]) -> None:
        """Lets go of deltas that no name points to any more, unless they are in use."""
        with self._lock:
            for digest in digests:
                self._kept.pop(digest, None)
                self._prewarmed.pop(digest, None)
                self._drop_from_host(digest, evicted=False)
                self._sizes.pop(digest, None)
                self._failures.pop(digest, None)
                for tier in ("disk", "host"):
                    self._costs.pop((tier, digest), None)
                slot = self._slot_of.get(digest)
                if slot is not None and not self._pins[slot]:
                    self._drop_from_device(digest, evicted=False)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._copier.shutdown(wait=True, cancel_futures=True)

    def state(self, digest: DeltaDigest) -> str:
        """device, host or disk."""
        with self._lock:
            return "device" if digest in self._slot_of else "host" if digest in self._host_tier else "disk"

    def on_device(self) -> list[DeltaDigest]:
        with self._lock:
            return list(self._slot_of)

    def tier_bytes(self) -> dict[str, int]:
        """Bytes of the deltas in each tier, from their tensors. On the CPU both tiers are the same memory."""
        with self._lock:
            return {"device": self._device_bytes(), "host": sum(delta.nbytes for delta in self._host_tier.values())}

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {"device": len(self._slot_of), "host": len(self._host_tier), "pinned": sum(map(bool, self._pins))}

    def resident_bytes(self, digest: DeltaDigest) -> int | None:
        """Bytes of one delta where it is loaded, else None."""
        with self._lock:
            delta = self.slots[self._slot_of[digest]] if digest in self._slot_of else self._host_tier.get(digest)
            return delta.nbytes if delta else None

    # All that follows is called under the lock, but for _read_one, _copy_one and _tell.

    def _settle(self) -> None:
        """Brings what can be brought, in turn; the first that finds no room is not overtaken. Starts the next read."""
        self._closed.clear()
        for digest in self._lacking():
            host = self._host_tier.get(digest)
            if host is None or self._try_bring(digest, host):
                continue
            beside = self._kept_bytes(digest)
            if beside and beside + host.nbytes > (self._limits.device_bytes or math.inf):
                message = f"the delta {digest[:12]}, {host.nbytes} bytes, does not fit beside those that are kept"
                self._failures[digest] = DeltaLoadFailed(message)
                continue
            if digest in self._wanted or digest in self._kept:
                self._close_for(digest, host.nbytes)
                break
            self._prewarmed.pop(digest)
        if self._reading is None and (following := self._next_to_read()) is not None:
            self._reading = following
            self._reader.submit(self._read_one, following)

    def _lacking(self) -> Iterator[DeltaDigest]:
        """What should be on the device and is not, the first in turn first."""
        for digest in dict.fromkeys([*self._kept, *self._wanted, *self._prewarmed]):
            if digest not in self._slot_of and digest not in self._arriving and digest not in self._failures:
                yield digest

    def _first_without_room(self) -> DeltaDigest | None:
        return next((digest for digest in self._lacking() if digest in self._host_tier), None)

    def _next_to_read(self) -> DeltaDigest | None:
        """The first that is on disk alone, if the host holds it beside those that come before it."""
        count, size = 1, 0
        for digest in self._lacking():
            if digest not in self._host_tier:
                size += self._sizes.get(digest, 0)
                limit = self._limits.host_bytes
                fits = count <= self._limits.host_deltas and (limit is None or size <= limit)
                return digest if fits or count == 1 else None
            count, size = count + 1, size + self._host_tier[digest].nbytes
        return None

    def _read_one(self, digest: DeltaDigest) -> None:
        began = self._clock()
        failure: Failure | None = None
        host: ResidentDelta | None = None
        try:
            with self._file_of(digest) as path:
                host = read_delta(path, digest, self._load)
        except (DeltaLoadFailed, StoreUnavailable) as error:
            failure = error
        except Exception as error:
            failure = DeltaLoadFailed(f"the delta {digest[:12]} does not load: {type(error).__name__}: {error}")
        with self._lock:
            self._reading = None
            if host is not None:
                self._sizes[digest] = host.nbytes
                self._costs["disk", digest] = self._clock() - began
                self._host_tier[digest] = host
                self._use_on_host(digest)
                self._trim_host(digest)
            self._moved(digest, failure)
        self._tell("disk", began, failure)

    def _try_bring(self, digest: DeltaDigest, host: ResidentDelta) -> bool:
        """Into a slot, unpinned; False, and nothing evicted, if no room can be made."""
        slot = self._try_free_slot(digest, host.nbytes)
        if slot is None:
            return False
        self._use_on_host(digest)
        if self._device.type == "cpu":
            self._place(digest, slot, host, 0.0)
        else:
            self._arriving[digest] = slot, host.nbytes
            self._copier.submit(self._copy_one, digest, slot, host)
        return True

    def _copy_one(self, digest: DeltaDigest, slot: Slot, host: ResidentDelta) -> None:
        began = self._clock()
        failure: Failure | None = None
        copy: ResidentDelta | None = None
        try:
            copy = host.to(self._device)
        except Exception as error:
            failure = DeltaLoadFailed(f"the delta {digest[:12]} does not fit: {type(error).__name__}: {error}")
        with self._lock:
            del self._arriving[digest]
            if copy is not None:
                self._place(digest, slot, copy, self._clock() - began)
            self._moved(digest, failure)
        self._tell("host", began, failure)

    def _place(self, digest: DeltaDigest, slot: Slot, delta: ResidentDelta, seconds: float) -> None:
        self._costs["host", digest] = seconds
        self.slots[slot], self._slot_of[digest] = delta, slot
        self._placed_s[slot] = self._clock()
        self._prewarmed.pop(digest, None)
        self._use_on_device(digest)

    def _moved(self, digest: DeltaDigest, failure: Failure | None) -> None:
        """Whoever waits for a delta that failed is told, and nobody else."""
        if failure is not None:
            logger.error("%s", failure.message)
            if self._wanted.pop(digest, None) is not None:
                self._failures[digest] = failure
            self._kept.pop(digest, None)
            self._prewarmed.pop(digest, None)
        self._settle()

    def _tell(self, tier: str, began: float, failure: Failure | None) -> None:
        """Without the lock: the engine may hold its own while it asks for ours."""
        if failure is None:
            self._on_loaded(tier, self._clock() - began)
        self._on_ready()

    def _reload_s(self, digest: DeltaDigest) -> float:
        """What it would take to bring a delta to the device again."""
        from_disk = 0.0 if digest in self._host_tier else self._costs.get(("disk", digest), 0.0)
        return from_disk + self._costs.get(("host", digest), 0.0)

    def _had_quantum(self, digest: DeltaDigest) -> bool:
        quantum = max(self._limits.quantum_s, AMORTISE * self._reload_s(digest))
        return self._clock() - self._placed_s[self._slot_of[digest]] >= quantum

    def _try_free_slot(self, digest: DeltaDigest, num_bytes: int) -> Slot | None:
        """An empty slot, after evicting what must go for the count and the bytes; None, and nothing evicted, if that
        would take one that is pinned or kept, or waited for and before `digest` in turn or without its quantum yet
        (unless `digest` is waited for by who holds others)."""
        turns = {wanted: place for place, wanted in enumerate(self._wanted)}
        own = turns.get(digest, -1)
        at_once = own == 0 and bool(self._held)
        free = [d for d, slot in self._slot_of.items() if not self._pins[slot] and d not in self._kept]
        free = [d for d in free if d not in turns or (turns[d] > own and (at_once or self._had_quantum(d)))]
        free.sort(key=lambda d: (d in turns, self._on_device.standing(d)), reverse=True)
        victims: list[DeltaDigest] = []
        count, held = len(self._slot_of) + len(self._arriving), self._device_bytes()
        while not self._fits(count, held, num_bytes):
            if not free:
                return None
            victims.append(free.pop())
            count, held = count - 1, held - self._bytes_of(victims[-1])
        for digest in victims:
            self._drop_from_device(digest)
        taken = {slot for slot, _ in self._arriving.values()}
        return next(Slot(i) for i, delta in enumerate(self.slots) if delta is None and i not in taken)

    def _fits(self, count: int, held: int, num_bytes: int) -> bool:
        return count < len(self.slots) and (not held or held + num_bytes <= (self._limits.device_bytes or math.inf))

    def _close_for(self, wanted: DeltaDigest, num_bytes: int) -> None:
        """Closes slots in use that had their quantum, the one whose delta came longest ago first, until `wanted` would
        fit without them; none of what goes before it in turn."""
        before = itertools.takewhile(lambda digest: digest != wanted, self._wanted)
        spared = {*before, *self._held, *self._kept}
        count, held = len(self._slot_of) + len(self._arriving), self._device_bytes()
        for digest, slot in sorted(self._slot_of.items(), key=lambda item: self._placed_s[item[1]]):
            if self._fits(count, held, num_bytes):
                return
            if self._pins[slot] and digest not in spared and self._had_quantum(digest):
                self._closed.add(slot)
                count, held = count - 1, held - self._bytes_of(digest)

    def _bytes_of(self, digest: DeltaDigest) -> int:
        delta = self.slots[self._slot_of[digest]]
        return delta.nbytes if delta else 0

    def _kept_bytes(self, but: DeltaDigest) -> int:
        """0 where nothing else is kept: a delta larger than the limit is served alone."""
        return sum(self._bytes_of(digest) for digest in self._kept if digest != but and digest in self._slot_of)

    def _device_bytes(self) -> int:
        placed = sum(delta.nbytes for delta in self.slots if delta is not None)
        return placed + sum(size for _, size in self._arriving.values())

    def _trim_host(self, newest: DeltaDigest) -> None:
        """Down to the limits, but for `newest`: what is not waited for first, then what is last in turn."""
        turns = {digest: place for place, digest in enumerate(self._wanted)}
        order = [digest for digest in self._host_tier if digest != newest]
        order.sort(key=lambda d: (d in turns, -turns.get(d, 0), self._on_host.standing(d)), reverse=True)
        limit = self._limits.host_bytes
        held = sum(delta.nbytes for delta in self._host_tier.values())
        while order and (len(self._host_tier) > self._limits.host_deltas or (limit is not None and held > limit)):
            held -= self._host_tier[order[-1]].nbytes
            self._drop_from_host(order.pop())

    def _use_on_device(self, digest: DeltaDigest) -> None:
        self._on_device.use(digest, self._reload_s(digest), self._bytes_of(digest))
        if digest in self._host_tier:
            self._use_on_host(digest)

    def _use_on_host(self, digest: DeltaDigest) -> None:
        self._on_host.use(digest, self._costs.get(("disk", digest), 0.0), self._host_tier[digest].nbytes)

    def _drop_from_device(self, digest: DeltaDigest, *, evicted: bool = True) -> None:
        assert not self._pins[self._slot_of[digest]]
        self.slots[self._slot_of.pop(digest)] = None
        self._on_device.remove(digest, evicted=evicted)

    def _drop_from_host(self, digest: DeltaDigest, *, evicted: bool = True) -> None:
        self._host_tier.pop(digest, None)
        self._on_host.remove(digest, evicted=evicted)
