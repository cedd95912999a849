"""One API request against its tenant's limits, and on its bill."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request as HttpRequest

from deltaserve.api.deps import Services
from deltaserve.engine.types import SamplingParams
from deltaserve.errors import BadRequest
from deltaserve.tenants.accounts import Caller


class Meter:
    """`enter` before any work, `begin` when the size is known, `spend` as it answers, `end` after the last token."""

    def __init__(self, services: Services, http: HttpRequest) -> None:
        self.caller: Caller = http.state.caller
        self._services = services
        self._limits = self.caller.tenant.limits
        self._reply_headers: dict[str, str] = http.state.reply_headers
        self._prompt_tokens = 0
        self._completion_tokens = 0

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

    def begin(self, num_sequences: int, prompt_tokens: int) -> None:
        """Raises RateLimited, BadRequest."""
        self._ticket.begin(num_sequences, prompt_tokens)
        self._prompt_tokens = prompt_tokens

    def undo(self) -> None:
        """It was refused after `begin`: nothing is charged but the request."""
        self._ticket.end(did_run=False)

    def spend(self, tokens: int) -> None:
        self._completion_tokens += tokens
        self._ticket.spend(tokens)

    def end(self, model: str) -> None:
        self._ticket.end()
        used = (self.caller.tenant.name, model, self._prompt_tokens, self._completion_tokens)
        self._services.usage.record(self.caller.tenant, *used[1:])
        self._services.metrics.used(*used)
