"""PUT, GET, DELETE /v1/deltas/{name}: upload, look at, forget a delta."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from deltaserve.api.deps import Services, ServicesDep
from deltaserve.deltas.store import Record, check_name
from deltaserve.errors import ArtifactTooLarge, NameConflict

router = APIRouter()
PIECE_BYTES = 2**20  # handed to the disk at once
Sha256 = Annotated[str | None, Query(pattern="^[0-9a-fA-F]{64}$")]


def _card(services: Services, record: Record) -> dict[str, Any]:
    return {
        "id": record.name,
        "object": "delta",
        "version": record.version,
        "sha256": record.digest,
        "created": record.created,
        **record.summary,
        "resident_bytes": services.residency.resident_bytes(record.digest) or record.summary["resident_bytes"],
        "state": services.residency.state(record.digest),
    }


@router.put("/v1/deltas/{name:path}")
async def upload_delta(name: str, http: Request, services: ServicesDep, sha256: Sha256 = None) -> JSONResponse:
    """The body is the artifact. Acknowledged when it is checked and safe on disk; 201 for a new name, else 200."""
    services.refuse_if_draining()
    check_name(name)
    if name == services.base_id:
        raise NameConflict(f"{name!r} is the base model's id; choose another name", param="name")
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
        record, is_new = await in_pool(services.intake.accept, name, upload, sha256)
    finally:
        await asyncio.shield(in_pool(upload.close))
    return JSONResponse(_card(services, record), 201 if is_new else 200)


@router.get("/v1/deltas")
async def list_deltas(services: ServicesDep) -> dict[str, Any]:
    records = await asyncio.to_thread(services.store.records)
    return {"object": "list", "data": [_card(services, record) for record in records]}


@router.get("/v1/deltas/{name:path}")
async def get_delta(name: str, services: ServicesDep) -> dict[str, Any]:
    return _card(services, await asyncio.to_thread(services.store.get, name))


@router.delete("/v1/deltas/{name:path}")
async def delete_delta(name: str, services: ServicesDep) -> dict[str, Any]:
    """New requests find nothing; running ones finish."""
    await asyncio.to_thread(services.store.delete, name)
    return {"id": name, "object": "delta", "deleted": True}
