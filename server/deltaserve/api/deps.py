"""What handlers need: the services, who calls, and what a caller must be allowed to do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.params import Depends as Dependency
from fastapi.security import HTTPBearer

from deltaserve.deltas.intake import Intake
from deltaserve.deltas.residency import Residency
from deltaserve.deltas.store import DeltaStore
from deltaserve.engine.loop import Engine
from deltaserve.engine.text import TextSide
from deltaserve.errors import Draining, PermissionDenied
from deltaserve.metrics import Metrics
from deltaserve.settings import Settings
from deltaserve.tenants.accounts import Accounts, Caller, Scope
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.limits import Gate
from deltaserve.tenants.registry import Registry
from deltaserve.tenants.usage import Usage


@dataclass
class Services:
    """Everything behind the HTTP layer, made by app.build_services."""

    settings: Settings
    base_id: str
    base_fingerprint: str
    created: int
    max_model_len: int
    runtime: dict[str, str]  # what runs: versions, device, dtype, kernels
    engine: Engine
    text: TextSide
    registry: Registry
    accounts: Accounts
    keys: Keys
    gate: Gate
    usage: Usage
    store: DeltaStore
    intake: Intake
    residency: Residency
    metrics: Metrics
    upload_pool: ThreadPoolExecutor
    draining: bool = field(default=False)
    _pinning: threading.Lock = field(default_factory=threading.Lock)

    def keep_pinned(self) -> None:
        """After a change to what pinned names point to."""
        with self._pinning:  # the last to read is the last to tell
            self.residency.keep(self.store.models.pinned())

    def refuse_if_draining(self) -> None:
        if self.draining:
            raise Draining("the server is shutting down")


async def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


async def caller(request: Request) -> Caller:
    """Who api.middleware.Authenticate found."""
    found: Caller = request.state.caller
    return found


ServicesDep = Annotated[Services, Depends(services)]
CallerDep = Annotated[Caller, Depends(caller)]
DESCRIBED = HTTPBearer(auto_error=False, description="an API key")  # for the OpenAPI document; the middleware checks


def needs(*any_of: Scope) -> list[Dependency]:
    """For a router: its callers have one of these scopes. Raises PermissionDenied."""

    async def check(who: CallerDep) -> None:
        if not who.may(*any_of):
            raise PermissionDenied(f"this key lacks the scope {' or '.join(any_of or ('admin',))}")

    return [Depends(DESCRIBED), Depends(check)]
