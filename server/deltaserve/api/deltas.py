"""/v1/deltas/{name}: upload, look at, forget a model's delta. NAME as in tenants.models."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from deltaserve.api.deps import CallerDep, Services, ServicesDep
from deltaserve.deltas.store import Destination
from deltaserve.errors import ArtifactTooLarge, NameConflict
from deltaserve.tenants.accounts import Caller
from deltaserve.tenants.models import Model, Version, check_name, missing

router = APIRouter()
changing = APIRouter()
PIECE_BYTES = 2**20  # handed to the disk at once
Sha256 = Annotated[str | None, Query(pattern="^[0-9a-fA-F]{64}$")]


def _card(services: Services, caller: Caller, model: Model, version: Version) -> dict[str, Any]:
    return {
        "id": model.called_by(caller),
        "object": "delta",
        "owner": model.owner,
        "version": version.number,
        "sha256": version.digest,
        "created": version.created,
        **version.summary,
        "resident_bytes": services.residency.resident_bytes(version.digest) or version.summary["resident_bytes"],
        "state": services.residency.state(version.digest),
    }


def _destination(services: Services, caller: Caller, called: str) -> Destination:
    """NAME, or TENANT:NAME for an admin. Raises InvalidName, NameConflict, NotFound."""
    if called == services.base_id:
        raise NameConflict(f"{called!r} is the base model's id; choose another name", param="name")
    tenant, colon, name = called.rpartition(":")
    owner = caller.tenant
    if colon and tenant != owner.name:
        if not caller.is_admin:
            raise missing(called)
        owner = services.accounts.named(tenant)
    check_name(name)
    return Destination(owner, name, str(caller))


@changing.put("/v1/deltas/{name:path}")
async def upload_delta(
    name: str, http: Request, services: ServicesDep, caller: CallerDep, sha256: Sha256 = None
) -> JSONResponse:
    """The body is the artifact. Acknowledged when it is checked and safe on disk; 201 for a new name, else 200."""
    services.refuse_if_draining()
    to = _destination(services, caller, name)
    declared = http.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > services.intake.max_bytes:
        raise ArtifactTooLarge(f"{declared} bytes; at most {services.intake.max_bytes} are accepted")
    in_pool = partial(asyncio.get_running_loop().run_in_executor, services.upload_pool)  # requests have other threads
    upload = await in_pool(services.intake.begin)
    try:
        pending = bytearray()
        async for piece in http.stream():
            pending += piece
            if len(pending) >= PIECE_BYTES:
                await in_pool(upload.write, bytes(pending))
                pending.clear()
        await in_pool(upload.write, bytes(pending))
        stored = await in_pool(services.intake.accept, to, upload, sha256)
    finally:
        await asyncio.shield(in_pool(upload.close))
    card = _card(services, caller, stored.model, stored.version)
    return JSONResponse(card, 201 if stored.is_new_name else 200)


@router.get("/v1/deltas")
async def list_deltas(services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    models = await asyncio.to_thread(services.store.models.visible, caller)
    return {"object": "list", "data": [_card(services, caller, model, model.active) for model in models]}


@router.get("/v1/deltas/{name:path}")
async def get_delta(name: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    model, version = await asyncio.to_thread(services.store.models.find, caller, name)
    return _card(services, caller, model, version or model.active)


@changing.delete("/v1/deltas/{name:path}")
async def delete_delta(name: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """New requests find nothing; running ones finish."""
    await asyncio.to_thread(services.store.delete, caller, name)
    return {"id": name, "object": "delta", "deleted": True}
