"""What tenants used: requests, tokens and time on the device by tenant, model and day (UTC), to bill from.

Counted in memory as requests end, and written once a second: a crash loses the last second at most. A deleted tenant's
figures stay.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from deltaserve.errors import RegistryUnavailable, StorageFull
from deltaserve.tenants.accounts import Tenant
from deltaserve.tenants.registry import Registry

logger = logging.getLogger(__name__)
WRITE_EVERY_S = 1.0
FIRST_DAY, LAST_DAY = "0000-00-00", "9999-99-99"
Kind = tuple[int, str, str, str]  # tenant's id and name, model, day


@dataclass(frozen=True)
class Used:
    """One line of the bill. Tokens as in the replies' `usage`; each model of a mixture computes them all. `resident_s`:
    seconds that the model's weights were on the device, for the tenants that had asked for them."""

    tenant: str
    model: str
    day: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens, those that were found and not computed
    resident_s: float = 0


AMOUNTS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "resident_s")
ADDED = ", ".join(f"{what} = usage.{what} + excluded.{what}" for what in AMOUNTS)
UPSERT = f"""INSERT INTO usage (tenant, tenant_name, model, day, {", ".join(AMOUNTS)})
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (tenant, model, day) DO UPDATE SET {ADDED}"""


class Usage:
    """Thread-safe. `close` writes what is left, if it can."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Kind, str]] = Counter()  # seconds are no integers, and counted all the same
        self._writing = threading.Lock()
        self._something = threading.Event()
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write_on, name="usage", daemon=True)
        self._writer.start()

    def add(self, tenant_id: int, tenant: str, model: str, **amounts: float) -> None:
        """`amounts`: of AMOUNTS."""
        kind = (tenant_id, tenant, model, time.strftime("%Y-%m-%d", time.gmtime(self._clock())))
        with self._lock:
            for what, amount in amounts.items():
                self._counts[kind, what] += amount  # type: ignore[assignment]
        self._something.set()

    def report(self, tenant: Tenant | None = None, since: str = FIRST_DAY, until: str = LAST_DAY) -> list[Used]:
        """By day, tenant and model, from day `since` (YYYY-MM-DD) up to and with day `until`."""
        self.write()
        rows = self._registry.rows(
            f"SELECT tenant_name, model, day, {', '.join(AMOUNTS)} FROM usage "
            f"WHERE day BETWEEN ? AND ? {'AND tenant = ?' if tenant else ''} ORDER BY day, tenant, model",
            *((since, until, tenant.id) if tenant else (since, until)),
        )
        return [Used(*row) for row in rows]

    def write(self) -> None:
        """What was counted goes to disk. Raises StorageFull, RegistryUnavailable; then it is still counted."""
        with self._writing:
            with self._lock:
                counts, self._counts = self._counts, Counter()
            if not counts:
                return
            try:
                with self._registry.write() as db:
                    for kind in {kind for kind, _ in counts}:
                        db.execute(UPSERT, (*kind, *(counts[kind, what] for what in AMOUNTS)))
            except BaseException:
                with self._lock:
                    self._counts += counts
                raise

    def close(self) -> None:
        self._closed.set()
        self._something.set()
        self._writer.join()
        self._try_to_write()

    def _write_on(self) -> None:
        while self._something.wait() and not self._closed.wait(WRITE_EVERY_S):
            self._something.clear()
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self.write()
        except (StorageFull, RegistryUnavailable) as error:
            logger.error("usage is not written, and tried again: %s", error.message)
            self._something.set()
