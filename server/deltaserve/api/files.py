"""/v1/files: OpenAI's Files API, for what a job reads: a checkpoint's files, one by one."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from deltaserve.api.deltas import in_pieces, largest
from deltaserve.api.deps import CallerDep, ServicesDep
from deltaserve.api.multipart import OVERHEAD_BYTES, OneFile
from deltaserve.api.openapi import raises
from deltaserve.deltas.staging import check_filename
from deltaserve.deltas.store import Destination
from deltaserve.errors import (
    ArtifactTooLarge,
    BadRequest,
    CheckpointError,
    Draining,
    FileInUse,
    InvalidName,
    NotFound,
    QuotaExceeded,
    RateLimited,
    StorageFull,
)
from deltaserve.tenants.files import FOR_A_JOB, StagedFile

router = APIRouter(prefix="/v1/files")
A_FORM = {"multipart/form-data": {"schema": {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": {"purpose": {"const": FOR_A_JOB}, "file": {"type": "string", "format": "binary"}},
}}}  # fmt: skip


def _card(file: StagedFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created,
        "expires_at": file.expires,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "sha256": file.sha256,
    }


@router.post(
    "",
    openapi_extra={
        "requestBody": {"required": True, "content": A_FORM},
        **raises(InvalidName, CheckpointError, ArtifactTooLarge, QuotaExceeded, RateLimited, StorageFull, Draining),
    },
)
async def create_file(http: Request, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """A form with `purpose` (user_data) and `file`: a .safetensors, .json, .jsonl or .jinja file. Acknowledged when it
    is safe on disk. Larger ones go up in parts: /v1/uploads."""
    services.refuse_if_draining()
    http.state.max_body_bytes = math.inf  # below is its own bound
    declared = http.headers.get("content-length", "")
    to = Destination(caller.tenant, "", str(caller))
    most = largest(services, to, max(int(declared) - OVERHEAD_BYTES, 0) if declared.isdigit() else 0)
    num_bytes = min(int(declared), most) if declared.isdigit() else most
    in_pool = partial(asyncio.get_running_loop().run_in_executor, services.upload_pool)
    texts = {"purpose": ""}
    names: list[str] = []

    def begin(filename: str) -> None:
        check_filename(filename)
        names.append(filename)

    with services.gate.upload(caller.tenant.id, caller.tenant.limits, num_bytes):
        upload = await in_pool(services.intake.begin, most)
        try:
            form = OneFile(http.headers.get("content-type", ""), "file", upload.write, texts=texts, begin=begin)
            await in_pieces(http, partial(in_pool, form.feed))
            form.end()
            if texts["purpose"] != FOR_A_JOB:
                raise BadRequest(f"`purpose` must be {FOR_A_JOB}; artifacts go to /v1/uploads", param="purpose")
            keep = partial(services.staging.keep, caller.tenant, names[0], FOR_A_JOB, upload, None)
            return _card(await in_pool(keep))
        finally:
            await asyncio.shield(in_pool(upload.close))


@router.get("")
async def list_files(services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The tenant's own, newest first."""
    files = await asyncio.to_thread(services.staging.rows.of, caller.tenant)
    return {"object": "list", "data": [_card(file) for file in files], "has_more": False}


@router.get("/{file_id}", openapi_extra=raises(NotFound))
async def get_file(file_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """What is known of a file; its bytes are for jobs alone."""
    return _card(await asyncio.to_thread(services.staging.rows.find, caller, file_id))


@router.delete("/{file_id}", openapi_extra=raises(NotFound, FileInUse, StorageFull))
async def delete_file(file_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """409 while a job is to read it."""
    await asyncio.to_thread(services.staging.delete, caller, file_id)
    return {"id": file_id, "object": "file", "deleted": True}
