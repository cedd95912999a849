"""Where deltas are: disk → host → device, on demand, least recently used out first, never one that is pinned.

Loads run on a thread of their own: read and verify the file, spell out masks, copy to the device. The engine's thread
asks with `try_pin` and never waits. Slots are the device's places; a pinned slot keeps its delta.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.resident import Load, ResidentDelta
from deltaserve.errors import BadRequest, DeltaLoadFailed
from deltaserve.ids import DeltaDigest, Slot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Of each tier: deltas, and bytes (None = no bound)."""

    device_deltas: int
    host_deltas: int
    device_bytes: int | None = None
    host_bytes: int | None = None


class Residency:
    """Implements engine.types.DeltaGate. Thread-safe; `slots` is read by the runner during a step."""

    def __init__(
        self,
        path_of: Callable[[DeltaDigest], Path],
        device: torch.device,
        limits: Limits,
        *,
        load: Load = ResidentDelta.load,
        on_ready: Callable[[], None],
        on_loaded: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.slots: list[ResidentDelta | None] = [None] * limits.device_deltas
        self._path_of = path_of
        self._device = device
        self._limits = limits
        self._load_artifact = load
        self._on_ready = on_ready
        self._on_loaded = on_loaded
        self._lock = threading.RLock()
        self._device_tier: OrderedDict[DeltaDigest, Slot] = OrderedDict()  # least recently used first
        self._host_tier: OrderedDict[DeltaDigest, ResidentDelta] = OrderedDict()
        self._pins = [0] * limits.device_deltas
        self._loading: set[DeltaDigest] = set()
        self._kept: set[DeltaDigest] = set()  # evicted last
        self._sizes: dict[DeltaDigest, int] = {}  # bytes of what was loaded once
        self._failures: dict[DeltaDigest, DeltaLoadFailed] = {}  # not told yet
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="delta-loader")

    def try_pin(self, digest: DeltaDigest) -> Slot | None:
        """The delta's slot with one more pin; None while it loads or no slot can be had. Raises DeltaLoadFailed once
        for a load that failed; the next call tries again."""
        with self._lock:
            if digest in self._device_tier:
                slot = self._device_tier[digest]
                self._device_tier.move_to_end(digest)
                self._pins[slot] += 1
                return slot
            if (failure := self._failures.pop(digest, None)) is not None:
                raise failure
            self._begin_load(digest)
            return None

    def prewarm(self, digest: DeltaDigest) -> None:
        """Loads it, if it is not here and there is room beside what is in use. Returns at once."""
        with self._lock:
            if digest not in self._device_tier:
                self._begin_load(digest)

    def keep(self, digest: DeltaDigest) -> None:
        """Loads it now and evicts it last, until `let_go`: only where all others are in use. Raises
        BadRequest if no slot were left for all others."""
        with self._lock:
            if digest not in self._kept and len(self._kept) + 1 >= len(self.slots):
                raise BadRequest(
                    f"{len(self._kept)} deltas are kept on the device, and one of its slots must stay free"
                )
            self._kept.add(digest)
            self.prewarm(digest)

    def let_go(self, digest: DeltaDigest) -> None:
        """Takes `keep` back. Harmless for what is not kept."""
        with self._lock:
            self._kept.discard(digest)

    def _begin_load(self, digest: DeltaDigest) -> None:
        if digest not in self._loading and self._can_make_room(self._sizes.get(digest, 0)):
            self._loading.add(digest)
            self._loader.submit(self._load, digest)

    def unpin(self, slot: Slot) -> None:
        with self._lock:
            self._pins[slot] -= 1
            assert self._pins[slot] >= 0, f"slot {slot} was unpinned more often than pinned"

    def check_together(self, digests: Collection[DeltaDigest]) -> None:
        """Raises BadRequest if these can never be on the device at the same time; a size is known after one load."""
        limit = self._limits.device_bytes
        with self._lock:
            size = sum(self._sizes.get(digest, 0) for digest in digests)
        if len(digests) > len(self.slots):
            raise BadRequest(
                f"a mixture of {len(digests)} deltas; at most {len(self.slots)} are on the device", param="mixture"
            )
        if limit is not None and len(digests) > 1 and size > limit:
            raise BadRequest(
                f"the deltas of this mixture have {size} bytes together; the device holds {limit}", param="mixture"
            )

    def state(self, digest: DeltaDigest) -> str:
        """device, host or disk."""
        with self._lock:
            if digest in self._device_tier:
                return "device"
            return "host" if digest in self._host_tier else "disk"

    def tier_bytes(self) -> dict[str, int]:
        """Bytes of the deltas in each tier, from their tensors. On the CPU both tiers are the same memory."""
        with self._lock:
            return {"device": self._device_bytes(), "host": sum(delta.nbytes for delta in self._host_tier.values())}

    def counts(self) -> dict[str, int]:
        with self._lock:
            pinned = sum(pins > 0 for pins in self._pins)
            return {"device": len(self._device_tier), "host": len(self._host_tier), "pinned": pinned}

    def resident_bytes(self, digest: DeltaDigest) -> int | None:
        """Bytes of one delta where it is loaded, else None."""
        with self._lock:
            if digest in self._device_tier:
                delta = self.slots[self._device_tier[digest]]
                return delta.nbytes if delta else None
            return self._host_tier[digest].nbytes if digest in self._host_tier else None

    def discard(self, digests: Sequence[DeltaDigest]) -> None:
        """Lets go of deltas that no name points to any more, unless they are in use."""
        with self._lock:
            for digest in digests:
                self._host_tier.pop(digest, None)
                self._sizes.pop(digest, None)
                self._failures.pop(digest, None)
                self._kept.discard(digest)
                slot = self._device_tier.get(digest)
                if slot is not None and not self._pins[slot]:
                    self._evict(digest)

    def close(self) -> None:
        self._loader.shutdown(wait=True, cancel_futures=True)

    def _load(self, digest: DeltaDigest) -> None:
        began = time.monotonic()
        failure: DeltaLoadFailed | None = None
        try:
            with self._lock:
                host = self._host_tier.get(digest)
            if host is None:
                host = self._read(digest)
            with self._lock:
                self._sizes[digest] = host.nbytes
                self._host_tier[digest] = host
                self._host_tier.move_to_end(digest)
                self._trim_host()
                has_room = self._can_make_room(host.nbytes)
            if has_room:  # else it waits on the host, and the next `try_pin` asks again
                on_device = host.to(self._device)
                with self._lock:
                    self._place(digest, on_device)
            self._on_loaded(time.monotonic() - began)
        except DeltaLoadFailed as error:
            failure = error
        except Exception as error:
            failure = DeltaLoadFailed(f"the delta {digest[:12]} does not load: {type(error).__name__}: {error}")
        with self._lock:
            self._loading.discard(digest)
            if failure is not None:
                logger.error("%s", failure.message)
                self._failures[digest] = failure
        self._on_ready()

    def _place(self, digest: DeltaDigest, delta: ResidentDelta) -> None:
        """Into a slot, unpinned. Where every slot is pinned it stays on the host, and the next `try_pin` asks again."""
        slot = self._try_free_slot(delta.nbytes)
        if slot is not None:
            self.slots[slot] = delta
            self._device_tier[digest] = slot

    def _read(self, digest: DeltaDigest) -> ResidentDelta:
        path = self._path_of(digest)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise DeltaLoadFailed(f"the stored delta {digest[:12]} is damaged: its bytes have the digest {found[:12]}")
        return self._load_artifact(Artifact.open(path))

    def _try_free_slot(self, num_bytes: int) -> Slot | None:
        """An empty slot, after evicting what must go for the count and the bytes; None, and nothing evicted, if that
        would take a pinned delta."""
        occupied = [(digest, slot) for digest, slot in self._device_tier.items() if not self._pins[slot]]
        occupied.sort(key=lambda place: place[0] in self._kept)  # stable: least recently used first within both
        victims: list[DeltaDigest] = []
        limit = self._limits.device_bytes
        count, held = len(self._device_tier), self._device_bytes()
        while count >= len(self.slots) or (limit is not None and held and held + num_bytes > limit):
            if not occupied:
                return None
            digest, slot = occupied.pop(0)
            delta = self.slots[slot]
            count, held = count - 1, held - (delta.nbytes if delta else 0)
            victims.append(digest)
        for digest in victims:
            self._evict(digest)
        return Slot(self.slots.index(None))

    def _can_make_room(self, num_bytes: int) -> bool:
        """Is there room beside the deltas that are pinned?"""
        pinned = [delta for delta, pins in zip(self.slots, self._pins, strict=True) if pins and delta is not None]
        held, limit = sum(delta.nbytes for delta in pinned), self._limits.device_bytes
        return len(pinned) < len(self.slots) and (limit is None or not held or held + num_bytes <= limit)

    def _evict(self, digest: DeltaDigest) -> None:
        slot = self._device_tier.pop(digest)
        assert not self._pins[slot]
        self.slots[slot] = None

    def _device_bytes(self) -> int:
        return sum(delta.nbytes for delta in self.slots if delta is not None)

    def _trim_host(self) -> None:
        limit = self._limits.host_bytes
        while len(self._host_tier) > 1 and (
            len(self._host_tier) > self._limits.host_deltas
            or (limit is not None and sum(delta.nbytes for delta in self._host_tier.values()) > limit)
        ):
            self._host_tier.popitem(last=False)
