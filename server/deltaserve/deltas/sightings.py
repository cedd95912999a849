"""Who may be told that a delta is in memory. The same file of two tenants is one object, and one copy in memory: who
did not ask for it learns nothing of who did."""

from __future__ import annotations

import threading

from deltaserve.deltas.residency import Residency
from deltaserve.ids import DeltaDigest


class Sightings:
    """A tenant is told of a delta it asked for since the delta last came to the device. Thread-safe."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._askers: dict[DeltaDigest, set[int]] = {}
        self._lock = threading.Lock()

    def ask(self, digest: DeltaDigest, *tenant_ids: int) -> None:
        """They are about to use it. Where it is not on the device, it comes for them, and for nobody else."""
        with self._lock:
            if self._residency.state(digest) != "device":
                self._askers[digest] = set()
            self._askers.setdefault(digest, set()).update(tenant_ids)

    def may_know(self, digest: DeltaDigest, tenant_id: int) -> bool:
        with self._lock:
            return tenant_id in self._askers.get(digest, ())

    def forget(self, digest: DeltaDigest) -> None:
        with self._lock:
            self._askers.pop(digest, None)
