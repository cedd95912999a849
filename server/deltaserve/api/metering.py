"""One API request against its tenant's limits, and on its bill."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fastapi import Request as HttpRequest

from deltaserve.api.deps import Services
from deltaserve.engine.types import SamplingParams
from deltaserve.errors import BadRequest
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.accounts import Caller
from deltaserve.tenants.limits import Limits
from deltaserve.tenants.models import Version
from deltaserve.tenants.usage import AMOUNTS


class Meter:
    """`enter` before any work, `begin` when the size is known, `spend` as it answers, `end` after the last token."""

    def __init__(self, services: Services, http: HttpRequest) -> None:
        self.caller: Caller = http.state.caller
        self._services = services
        self._limits: Limits = self.caller.tenant.limits
        self._reply_headers: dict[str, str] = http.state.reply_headers
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._num_models = 1
        self._weights: dict[DeltaDigest, int] = {}

    @property
    def max_queued(self) -> int | None:
        return self._limits.max_queued

    def enter(self) -> None:
        """Raises RateLimited."""
        gate, tenant = self._services.gate, self.caller.tenant
        self._ticket = gate.enter(tenant.id, self._limits, self._reply_headers)

    def bounded(self, params: SamplingParams, asked_tokens: int | None) -> SamplingParams:
        """`params` within the tenant's longest answer. Raises BadRequest if more was asked for."""
        most = self._limits.max_tokens
        if most is None or params.max_tokens <= most:
            return params
        if asked_tokens is not None or params.min_tokens > most:
            raise BadRequest(f"this tenant may ask for {most} tokens an answer", param="max_tokens")
        return replace(params, max_tokens=most)

    def weigh(self, versions: Iterable[Version]) -> None:
        """Bytes on the device, where they are bounded: of the versions that it needs, and of what the tenant pinned."""
        if self._limits.max_resident_bytes is None:
            return
        loaded = self._services.residency.resident_bytes
        needed = {v.digest: loaded(v.digest) or v.summary["resident_bytes"] for v in versions}
        if needed:
            self._weights = self._services.store.models.pinned_bytes(self.caller.tenant.id) | needed

    def begin(self, num_sequences: int, prompt_tokens: int, num_models: int) -> None:
        """Each of `num_models` of a mixture computes every token. Raises RateLimited, BadRequest, QuotaExceeded."""
        self._ticket.begin(num_sequences * num_models, prompt_tokens * num_models, self._weights)
        self._prompt_tokens, self._num_models = prompt_tokens, num_models

    def undo(self) -> None:
        """It was refused after `begin`: nothing is charged but the request."""
        self._ticket.end(did_run=False)

    def spend(self, tokens: int) -> None:
        self._completion_tokens += tokens
        self._ticket.spend(tokens * self._num_models)

    def end(self, asked: str, models: Sequence[str], cached_tokens: int) -> None:
        """One request for `asked`, computed by `models`."""
        self._ticket.end()
        tenant = self.caller.tenant
        bill(self._services, tenant.id, tenant.name, asked, 1)
        tokens = (self._prompt_tokens, self._completion_tokens, cached_tokens)
        for model in models:
            bill(self._services, tenant.id, tenant.name, model, 0, *tokens)


def bill(services: Services, tenant_id: int, tenant: str, model: str, *amounts: float) -> None:
    """`amounts`: as many of tenants.usage.AMOUNTS, in their order; the bill and the metrics say the same."""
    services.usage.add(tenant_id, tenant, model, **dict(zip(AMOUNTS, amounts, strict=False)))
    services.metrics.used(tenant, model, *amounts)


class ResidencyMeter:
    """Time on the device. `read` it every now and then: what is there has been there since the last reading."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._read_at = time.monotonic()

    def read(self) -> None:
        now = time.monotonic()
        seconds, self._read_at = now - self._read_at, now
        services = self._services
        for digest in services.residency.on_device():
            for model in services.store.models.with_digest(digest):
                if model.pinned or services.sightings.may_know(digest, model.tenant_id):
                    bill(services, model.tenant_id, model.owner, model.name, 0, 0, 0, 0, seconds)
