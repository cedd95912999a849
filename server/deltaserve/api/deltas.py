"""/v1/deltas/{name}: upload, look at, move between versions, share, forget. NAME as in tenants.models."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from deltaserve.api.deps import CallerDep, Services, ServicesDep
from deltaserve.api.openapi import REFUSALS, raises
from deltaserve.api.paging import After, Limit, page
from deltaserve.api.schemas import Texts, Wire, example
from deltaserve.deltas.files import PIECE_BYTES
from deltaserve.deltas.store import Destination, Stored
from deltaserve.errors import (
    ArtifactTooLarge,
    BadRequest,
    Draining,
    ModelNotFound,
    NameConflict,
    PermissionDenied,
    PreconditionFailed,
    QuotaExceeded,
    StorageFull,
    VersionInUse,
)
from deltaserve.tenants.accounts import Caller
from deltaserve.tenants.limits import check_weights
from deltaserve.tenants.models import Canary, Change, Condition, Model, Version, check_name, missing

router = APIRouter()
changing = APIRouter()
A_FILE = {"requestBody": {"required": True, "content": {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}}}  # fmt: skip
Sha256 = Annotated[str | None, Query(pattern="^[0-9a-fA-F]{64}$")]
LONGEST_LIFE_S = 10 * 365 * 86400
Number = Annotated[int, Field(ge=1, lt=2**31)]


class CanaryIn(Wire):
    version: Number
    percent: Annotated[float, Field(gt=0, le=100)]


class ChangeIn(Wire):
    """What is left out stays; canary null ends it, expires_in_s null lets the model live for ever."""

    model_config = example(version=3, canary={"version": 4, "percent": 5})

    version: Number | None = None
    canary: CanaryIn | None = None
    pinned: bool | None = None
    expires_in_s: Annotated[int, Field(ge=1, le=LONGEST_LIFE_S)] | None = None
    shared_with: Annotated[Texts, Field(max_length=1000)] | None = None


async def condition(
    if_match: Annotated[str | None, Header()] = None, if_none_match: Annotated[str | None, Header()] = None
) -> Condition:
    return Condition(if_match, if_none_match)


ConditionDep = Annotated[Condition, Depends(condition)]


def _card(services: Services, caller: Caller, model: Model, version: Version) -> dict[str, Any]:
    card = {
        "id": model.called_by(caller),
        "object": "delta",
        "owner": model.owner,
        "version": version.number,
        "sha256": version.digest,
        "created": version.created,
        **version.summary,
        "state": "disk",
    }
    is_own = model.pinned or services.sightings.may_know(version.digest, caller.tenant.id)
    if caller.is_admin or is_own:  # of a file that others have too, their use shows nowhere
        resident = services.residency.resident_bytes(version.digest) or version.summary["resident_bytes"]
        card |= {"resident_bytes": resident, "state": services.residency.state(version.digest)}
    if model.is_changed_by(caller):
        canary = vars(model.canary) if model.canary else None
        shared_with = list(model.shared_with)
        card |= {"active": model.active.number, "canary": canary, "pinned": model.pinned, "expires_at": model.expires}
        card["shared_with"] = shared_with
    return card


def _reply(card: dict[str, Any], model: Model, status: int = 200) -> JSONResponse:
    return JSONResponse(card, status, {"ETag": model.etag})


def destination(services: Services, caller: Caller, called: str, activate: bool, when: Condition) -> Destination:
    """NAME, or TENANT:NAME for an admin. Raises InvalidName, NameConflict, NotFound, PreconditionFailed."""
    if called == services.base_id:
        raise NameConflict(f"{called!r} is the base model's id; choose another name", param="name")
    tenant, colon, name = called.rpartition(":")
    owner = caller.tenant
    if colon and tenant != owner.name:
        if not caller.is_admin:
            raise missing(called)
        owner = services.accounts.named(tenant)
    check_name(name)
    return Destination(owner, name, str(caller), activate, when)


def largest(services: Services, to: Destination, declared: int) -> int:
    """Bytes that an upload may have. Raises ArtifactTooLarge where more are declared."""
    quota = to.owner.limits.max_bytes
    most = services.intake.max_bytes if quota is None else min(services.intake.max_bytes, quota)
    if declared > most:
        raise ArtifactTooLarge(f"{declared} bytes; at most {most} are accepted")
    return most


async def in_pieces(http: Request, write: Callable[[bytes], Awaitable[object]]) -> None:
    """The body, to `write`, PIECE_BYTES or a little more at a time."""
    pending = bytearray()
    async for piece in http.stream():
        pending += piece
        if len(pending) >= PIECE_BYTES:
            await write(bytes(pending))
            pending.clear()
    await write(bytes(pending))


async def _receive(services: Services, http: Request, to: Destination, max_bytes: int, sha256: str | None) -> Stored:
    """The body, to the disk, checked, and stored; nothing of it stays if any of that fails."""
    in_pool = partial(asyncio.get_running_loop().run_in_executor, services.upload_pool)  # requests have other threads
    upload = await in_pool(services.intake.begin, max_bytes)
    try:
        await in_pieces(http, partial(in_pool, upload.write))
        return await in_pool(services.intake.accept, to, upload, sha256)
    finally:
        await asyncio.shield(in_pool(upload.close))


@changing.put(
    "/v1/deltas/{name:path}", openapi_extra={**A_FILE, **raises(*REFUSALS, NameConflict, PreconditionFailed, Draining)}
)
async def upload_delta(
    name: str,
    http: Request,
    services: ServicesDep,
    caller: CallerDep,
    when: ConditionDep,
    sha256: Sha256 = None,
    activate: bool = True,
) -> JSONResponse:
    """The body is the artifact. Acknowledged when it is checked and safe on disk; 201 for a new name, else 200.
    `activate=false`: a name that is there points where it pointed."""
    services.refuse_if_draining()
    http.state.max_body_bytes = math.inf  # below is its own bound
    to = destination(services, caller, name, activate, when)
    when.check(
        await asyncio.to_thread(services.store.models.living, to.owner.id, to.name)
    )  # now, and when it is stored
    declared = http.headers.get("content-length", "")
    most = largest(services, to, int(declared) if declared.isdigit() else 0)
    num_bytes = int(declared) if declared.isdigit() else most
    with services.gate.upload(to.owner.id, to.owner.limits, num_bytes):
        stored = await _receive(services, http, to, most, sha256)
    await asyncio.to_thread(services.keep_pinned)
    card = _card(services, caller, stored.model, stored.version)
    return _reply(card, stored.model, 201 if stored.is_new_name else 200)


@router.get("/v1/deltas")
async def list_deltas(
    services: ServicesDep, caller: CallerDep, after: After = None, limit: Limit = None
) -> dict[str, Any]:
    """One's own by name, then what is shared with one; for admins everybody's."""

    def listed() -> dict[str, Any]:
        def card(model: Model) -> dict[str, Any]:
            return _card(services, caller, model, model.active)

        models = services.store.models.visible(caller)
        return page(models, lambda model: model.called_by(caller), card, after, limit)

    return await asyncio.to_thread(listed)


@router.get("/v1/deltas/{name}/versions", openapi_extra=raises(ModelNotFound))
async def list_versions(name: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Newest first."""

    def cards() -> list[dict[str, Any]]:
        model, _ = services.store.models.find(caller, name)
        return [_card(services, caller, model, version) for version in services.store.models.versions(model)]

    return {"object": "list", "data": await asyncio.to_thread(cards)}


@router.post("/v1/deltas/{name}/prewarm", status_code=202, openapi_extra=raises(ModelNotFound))
async def prewarm(name: str, services: ServicesDep, caller: CallerDep) -> JSONResponse:
    """Begins to bring it to the device, so that the first request need not wait; `state` says when it is there."""
    model, version = await asyncio.to_thread(services.store.models.find, caller, name)
    digest = (version or model.active).digest
    services.sightings.ask(digest, caller.tenant.id, model.tenant_id)
    services.residency.prewarm(digest)
    return _reply(_card(services, caller, model, version or model.active), model, 202)


@router.get("/v1/deltas/{name:path}", openapi_extra=raises(ModelNotFound))
async def get_delta(name: str, services: ServicesDep, caller: CallerDep) -> JSONResponse:
    """Where the name points, or of NAME@VERSION that version. The ETag is renewed by every change."""
    model, version = await asyncio.to_thread(services.store.models.find, caller, name)
    return _reply(_card(services, caller, model, version or model.active), model)


@changing.patch(
    "/v1/deltas/{name:path}", openapi_extra=raises(ModelNotFound, PreconditionFailed, QuotaExceeded, StorageFull)
)
async def change_delta(
    name: str, body: ChangeIn, services: ServicesDep, caller: CallerDep, when: ConditionDep
) -> JSONResponse:
    """Moves the name to another version, gives a canary a share of requests, pins, shares (admins only)."""

    def change() -> Model:
        if body.shared_with is not None and not caller.is_admin:  # a tenant that names others learns who is there
            raise PermissionDenied("an admin alone shares models with other tenants", param="shared_with")
        canary = Canary(body.canary.version, body.canary.percent) if body.canary else None
        model, version = services.store.models.owned(caller, name)
        if version is not None:
            raise BadRequest('versions do not change; {"version": N} is what moves the name to one', param="name")
        if canary is None and "canary" in body.model_fields_set:
            canary = Canary(model.active.number, 0)
        expires = None
        if "expires_in_s" in body.model_fields_set:
            expires = int(time.time()) + body.expires_in_s if body.expires_in_s else 0
        others = None if body.shared_with is None else [services.accounts.named(other) for other in body.shared_with]
        if body.pinned and not model.pinned:
            _check_pin(services, model)
            services.pin(model.active.digest)  # raises where there is no room, before anything is changed
        try:
            return services.store.change(caller, name, Change(body.version, canary, body.pinned, expires, others), when)
        finally:
            services.keep_pinned()

    model = await asyncio.to_thread(change)
    return _reply(_card(services, caller, model, model.active), model)


def _check_pin(services: Services, model: Model) -> None:
    """Raises QuotaExceeded where the owner's pinned models would be over its `max_resident_bytes`."""
    most = services.accounts.owner(model.tenant_id, "model").limits.max_resident_bytes
    if most is not None:
        version = model.active
        mine = {version.digest: version.summary["resident_bytes"]}
        check_weights(services.store.models.pinned_bytes(model.tenant_id) | mine, most)


@changing.delete(
    "/v1/deltas/{name:path}", openapi_extra=raises(ModelNotFound, PreconditionFailed, VersionInUse, StorageFull)
)
async def delete_delta(name: str, services: ServicesDep, caller: CallerDep, when: ConditionDep) -> dict[str, Any]:
    """A model with every version, or NAME@VERSION. New requests find nothing; running ones finish."""
    await asyncio.to_thread(services.store.delete, caller, name, when)
    await asyncio.to_thread(services.keep_pinned)
    return {"id": name, "object": "delta", "deleted": True}
