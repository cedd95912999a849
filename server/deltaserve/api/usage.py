"""GET /v1/usage: what the caller's tenant has used, holds, and may."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query

from deltaserve.api.deps import CallerDep, Services, ServicesDep
from deltaserve.tenants.accounts import Tenant

router = APIRouter()
Day = Annotated[str, Query(pattern=r"^(\d{4}-\d{2}-\d{2})?$", description="the first day, YYYY-MM-DD (UTC)")]


def usage_report(services: Services, tenant: Tenant | None, since: str) -> dict[str, Any]:
    return {"object": "list", "data": [vars(used) for used in services.usage.report(tenant, since)]}


@router.get("/v1/usage")
async def own_usage(services: ServicesDep, caller: CallerDep, since: Day = "") -> dict[str, Any]:
    """Requests and tokens by day and model; bytes and models held now; the limits."""

    def report() -> dict[str, Any]:
        models, size = services.store.models.held_by(caller.tenant.id)
        held = {"models": models, "bytes": size, "limits": vars(caller.tenant.limits)}
        return {**usage_report(services, caller.tenant, since), **held}

    return await asyncio.to_thread(report)
