"""GET /v1/usage: what the caller's tenant has used, holds, and may."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query

from deltaserve.api.deps import CallerDep, Services, ServicesDep
from deltaserve.errors import BadRequest
from deltaserve.tenants.accounts import Tenant
from deltaserve.tenants.usage import FIRST_DAY, LAST_DAY

router = APIRouter()
A_DAY = {"format": "date"}
Since = Annotated[str | None, Query(description="the first day, YYYY-MM-DD (UTC)", json_schema_extra=A_DAY)]
Until = Annotated[str | None, Query(description="the last day, YYYY-MM-DD (UTC)", json_schema_extra=A_DAY)]


def usage_report(services: Services, tenant: Tenant | None, since: str | None, until: str | None) -> dict[str, Any]:
    """Raises BadRequest for what is no day."""
    days = _day("since", since) or FIRST_DAY, _day("until", until) or LAST_DAY
    return {"object": "list", "data": [vars(used) for used in services.usage.report(tenant, *days)]}


def _day(param: str, text: str | None) -> str | None:
    with contextlib.suppress(ValueError):
        if not text or datetime.date.fromisoformat(text).isoformat() == text:  # and not 20261122, 2026-W47-7
            return text
    raise BadRequest(f"{param}: {text!r:.40} is no day, which is written YYYY-MM-DD", param=param)


@router.get("/v1/usage")
async def own_usage(
    services: ServicesDep, caller: CallerDep, since: Since = None, until: Until = None
) -> dict[str, Any]:
    """Requests and tokens by day and model; bytes and models held now; the limits."""

    def report() -> dict[str, Any]:
        models, size = services.store.models.held_by(caller.tenant.id)
        held = {"models": models, "bytes": size, "limits": vars(caller.tenant.limits)}
        return {**usage_report(services, caller.tenant, since, until), **held}

    return await asyncio.to_thread(report)
