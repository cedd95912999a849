"""How much each tier holds, and how long a place is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of each tier: deltas, and bytes (None = no bound). Of a slot: how long it is kept while others wait."""

    device_deltas: int
    host_deltas: int
    device_bytes: int | None = None
    host_bytes: int | None = None
    quantum_s: float = 1.0
    max_wait_s: float = 30.0
