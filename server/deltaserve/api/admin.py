"""/v1/admin: tenants with their limits, keys, usage, the audit log. For keys with the scope admin."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from deltaserve.api.deps import CallerDep, Services, ServicesDep
from deltaserve.api.openapi import raises
from deltaserve.api.paging import After, Limit, page
from deltaserve.api.schemas import Text, Wire, example
from deltaserve.api.usage import Since, Until, usage_report
from deltaserve.errors import InvalidName, NameConflict, NotFound, StorageFull
from deltaserve.tenants.accounts import Scope, Tenant
from deltaserve.tenants.keys import Key
from deltaserve.tenants.limits import Limits

router = APIRouter(prefix="/v1/admin")
LONGEST_S = 10 * 365 * 86400  # of a key's life, when it has an end


Bound = Annotated[int, Field(ge=0, lt=2**62)] | None
Rate = Annotated[int, Field(ge=1, lt=2**40)] | None


class LimitsIn(Wire):
    """What is left out stays; null lifts a bound. As tenants.limits.Limits."""

    requests_per_minute: Rate = None
    tokens_per_minute: Rate = None
    max_concurrent: Rate = None
    max_tokens: Rate = None
    max_bytes: Bound = None
    max_models: Bound = None
    max_queued: Bound = None
    max_resident_bytes: Bound = None


class TenantIn(Wire):
    model_config = example(name="acme", limits={"requests_per_minute": 600, "max_bytes": 10_000_000_000})

    name: Text
    limits: LimitsIn = LimitsIn()


class TenantChangeIn(Wire):
    model_config = example(limits={"tokens_per_minute": 100_000, "max_bytes": None})

    limits: LimitsIn


class KeyIn(Wire):
    model_config = example(tenant="acme", scopes=["inference", "manage"], label="ci", expires_in_s=7_776_000)

    tenant: Text
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1, max_length=4)] = [
        Scope.INFERENCE
    ]
    label: Annotated[Text, Field(max_length=128)] = ""
    expires_in_s: Annotated[int, Field(ge=1, le=LONGEST_S)] | None = None


class RotateIn(Wire):
    model_config = example(grace_s=3600)

    grace_s: Annotated[int, Field(ge=0, le=30 * 86400)] = 0


def _tenant(services: Services, tenant: Tenant) -> dict[str, Any]:
    models, size = services.store.models.held_by(tenant.id)
    return {
        "id": tenant.name,
        "object": "tenant",
        "created": tenant.created,
        "models": models,
        "bytes": size,
        "limits": vars(tenant.limits),
    }


def _key(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "key",
        "tenant": key.tenant.name,
        "scopes": sorted(key.scopes),
        "label": key.label,
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
    }


@router.post("/tenants", status_code=201, openapi_extra=raises(InvalidName, NameConflict, StorageFull))
async def create_tenant(body: TenantIn, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Without limits it may use what the server has. A name is not given again."""
    limits = Limits(**body.limits.model_dump())
    tenant = await asyncio.to_thread(services.accounts.create, body.name, str(caller), limits)
    return await asyncio.to_thread(_tenant, services, tenant)


@router.get("/tenants")
async def list_tenants(services: ServicesDep, after: After = None, limit: Limit = None) -> dict[str, Any]:
    """By name, with what they hold and their limits."""

    def listed() -> dict[str, Any]:
        tenants = services.accounts.all()
        return page(tenants, lambda tenant: tenant.name, lambda tenant: _tenant(services, tenant), after, limit)

    return await asyncio.to_thread(listed)


@router.get("/tenants/{name}", openapi_extra=raises(NotFound))
async def get_tenant(name: str, services: ServicesDep) -> dict[str, Any]:
    """What it holds, and its limits."""
    return await asyncio.to_thread(_tenant, services, services.accounts.named(name))


@router.patch("/tenants/{name}", openapi_extra=raises(NotFound, StorageFull))
async def change_tenant(name: str, body: TenantChangeIn, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """New limits, from the next request on."""
    changes = body.limits.model_dump(exclude_unset=True)
    tenant = await asyncio.to_thread(services.accounts.limit, services.accounts.named(name), changes, str(caller))
    return await asyncio.to_thread(_tenant, services, tenant)


@router.delete("/tenants/{name}", openapi_extra=raises(NotFound, NameConflict, StorageFull))
async def delete_tenant(name: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The tenant, its keys and its models; running requests finish."""

    def delete() -> None:
        tenant = services.accounts.named(name)
        services.accounts.check_deletable(tenant)
        services.parts.cancel_all(tenant)
        services.compressions.cancel_all(tenant, str(caller))
        services.staging.delete_all(tenant)
        services.store.delete_all(tenant, str(caller))
        services.accounts.delete(tenant, str(caller))
        services.keys.reload()

    await asyncio.to_thread(delete)
    return {"id": name, "object": "tenant", "deleted": True}


@router.post("/keys", status_code=201, openapi_extra=raises(NotFound, StorageFull))
async def create_key(body: KeyIn, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The reply's `key` is told this once."""

    def create() -> tuple[Key, str]:
        tenant = services.accounts.named(body.tenant)
        return services.keys.create(tenant, body.scopes, str(caller), label=body.label, expires_in_s=body.expires_in_s)

    key, text = await asyncio.to_thread(create)
    return {**_key(key), "key": text}


@router.get("/keys", openapi_extra=raises(NotFound))
async def list_keys(
    services: ServicesDep, tenant: str | None = None, after: After = None, limit: Limit = None
) -> dict[str, Any]:
    """All, or those of one tenant; never the keys themselves."""
    owner = services.accounts.named(tenant) if tenant is not None else None
    return page(services.keys.all(owner), lambda key: key.id, _key, after, limit)


@router.post("/keys/{key_id}/rotate", status_code=201, openapi_extra=raises(NotFound, StorageFull))
async def rotate_key(key_id: str, body: RotateIn, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """A new key of the same kind; the old one ends after `grace_s` seconds."""
    old = services.keys.get(key_id)
    key, text = await asyncio.to_thread(services.keys.rotate, old, str(caller), grace_s=body.grace_s)
    return {**_key(key), "key": text}


@router.delete("/keys/{key_id}", openapi_extra=raises(NotFound, StorageFull))
async def revoke_key(key_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Refused from the next request on; the key stays listed."""
    return _key(await asyncio.to_thread(services.keys.revoke, services.keys.get(key_id), str(caller)))


@router.get("/audit")
async def audit_log(
    services: ServicesDep,
    before: Annotated[int | None, Query(ge=1, lt=2**62)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """The newest entries first; `before` an entry's id: those that are older."""
    entries = await asyncio.to_thread(services.registry.audit_log, before=before, limit=limit)
    return {"object": "list", "data": [vars(entry) for entry in entries]}


@router.get("/usage", openapi_extra=raises(NotFound))
async def all_usage(
    services: ServicesDep, tenant: str | None = None, since: Since = None, until: Until = None
) -> dict[str, Any]:
    """By day, tenant and model."""
    owner = services.accounts.named(tenant) if tenant is not None else None
    return await asyncio.to_thread(usage_report, services, owner, since, until)
