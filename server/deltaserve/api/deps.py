"""What handlers need: the services, who calls, and what a caller must be allowed to do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.params import Depends as Dependency
from fastapi.security import HTTPBearer

from deltaserve.deltas.compressions import Compressions
from deltaserve.deltas.imports import Imports
from deltaserve.deltas.intake import Intake
from deltaserve.deltas.parts import PartStore
from deltaserve.deltas.residency import Residency
from deltaserve.deltas.sightings import Sightings
from deltaserve.deltas.staging import Staging
from deltaserve.deltas.store import DeltaStore
from deltaserve.engine.grammars import Grammars
from deltaserve.engine.loop import Engine
from deltaserve.engine.text import TextSide
from deltaserve.errors import BadRequest, Draining, PermissionDenied, UnsupportedParameter
from deltaserve.ids import DeltaDigest
from deltaserve.metrics import Metrics
from deltaserve.settings import Settings
from deltaserve.tenants.accounts import Accounts, Caller, Scope
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.limits import Gate
from deltaserve.tenants.registry import Registry
from deltaserve.tenants.usage import Usage

logger = logging.getLogger(__name__)


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
    grammars: Grammars
    registry: Registry
    accounts: Accounts
    keys: Keys
    gate: Gate
    usage: Usage
    store: DeltaStore
    intake: Intake
    parts: PartStore
    staging: Staging
    compressions: Compressions
    imports: Imports
    residency: Residency
    sightings: Sightings
    metrics: Metrics
    upload_pool: ThreadPoolExecutor
    unwatch: Callable[[], None]  # ends what is told of kernels that are compiled
    draining: bool = field(default=False)
    _pinning: threading.Lock = field(default_factory=threading.Lock)
    _kept: set[DeltaDigest] = field(default_factory=set)

    def pin(self, digest: DeltaDigest) -> None:
        """Before a name is pinned. Raises BadRequest where there is no room for it."""
        with self._pinning:
            self.residency.keep(digest)
            self._kept.add(digest)

    def keep_pinned(self) -> None:
        """Tells residency what pinned names point to now."""
        with self._pinning:  # the last to read is the last to tell
            wanted = set(self.store.models.pinned())
            for digest in self._kept - wanted:
                self.residency.let_go(digest)
            self._kept &= wanted
            for digest in wanted - self._kept:
                try:
                    self.residency.keep(digest)
                    self._kept.add(digest)
                except BadRequest as error:
                    logger.warning("a pinned model is not kept on the device: %s", error.message)

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


async def check_query(http: Request) -> None:
    """A parameter that nobody reads may be one that was misspelt: a digest would go unchecked. Raises
    UnsupportedParameter."""
    if not http.query_params:
        return
    operation = http.app.openapi()["paths"][http.scope["route"].path_format][http.method.lower()]
    known = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"}
    for name in http.query_params:
        if name not in known:
            allowed = f"there are {', '.join(sorted(known))}" if known else "there are none"
            raise UnsupportedParameter(f"this path has no parameter `{name[:64]}`; {allowed}", param=name[:64])


def needs(*any_of: Scope) -> list[Dependency]:
    """For a router: its callers have one of these scopes, and send no query that it does not know. Raises
    PermissionDenied, UnsupportedParameter."""

    async def check(who: CallerDep) -> None:
        if not who.may(*any_of):
            raise PermissionDenied(f"this key lacks the scope {' or '.join(any_of or ('admin',))}")

    return [Depends(DESCRIBED), Depends(check), Depends(check_query)]
