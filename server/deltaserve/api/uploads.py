"""/v1/uploads: OpenAI's Uploads API. With the purpose fine-tune the artifact NAME.safetensors becomes the model NAME;
with user_data a file is kept for a job (`api.compressions`)."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from deltaserve.api.deltas import destination, in_pieces, largest
from deltaserve.api.deps import CallerDep, ServicesDep
from deltaserve.api.multipart import OVERHEAD_BYTES, OneFile
from deltaserve.api.openapi import REFUSALS, raises
from deltaserve.api.schemas import ONE_FAULT, Text, Wire, example
from deltaserve.deltas.parts import MAX_PART_BYTES
from deltaserve.deltas.staging import check_filename
from deltaserve.deltas.store import Destination
from deltaserve.errors import (
    ArtifactTooLarge,
    CheckpointError,
    Draining,
    InvalidName,
    NameConflict,
    NotFound,
    RateLimited,
    StorageFull,
    UploadClosed,
)
from deltaserve.tenants.accounts import Caller
from deltaserve.tenants.files import FOR_A_JOB
from deltaserve.tenants.models import ALWAYS
from deltaserve.tenants.uploads import MAX_PARTS, Part, PartedUpload

router = APIRouter(prefix="/v1/uploads")
SUFFIX = ".safetensors"
A_FORM = {"multipart/form-data": {"schema": {
    "type": "object", "required": ["data"], "properties": {"data": {"type": "string", "format": "binary"}},
}}}  # fmt: skip


class UploadIn(Wire):
    """`filename`: for the purpose fine-tune NAME.safetensors. `activate` false: a name that is there points where it
    pointed."""

    model_config = example(
        bytes=1_240_000_000,
        filename="acme.safetensors",
        mime_type="application/octet-stream",
        purpose="fine-tune",
    )

    bytes: Annotated[int, Field(ge=1, lt=2**62)]
    filename: Annotated[Text, Field(max_length=512)]
    mime_type: Annotated[Text, Field(max_length=255)]
    purpose: Literal["fine-tune", "user_data"]
    activate: bool = True


class CompleteIn(Wire):
    """The parts in the order of the file; what it is expected to be."""

    model_config = example(part_ids=["part_" + 64 * "0", "part_" + 64 * "1"], sha256=64 * "2")

    part_ids: Annotated[
        list[Annotated[Text, Field(max_length=128)]], Field(min_length=1, max_length=MAX_PARTS), ONE_FAULT
    ]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None


def _part(upload: PartedUpload, part: Part) -> dict[str, Any]:
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": part.created,
        "upload_id": upload.id,
        "bytes": part.num_bytes,
        "sha256": part.sha256,
    }


def _card(caller: Caller, upload: PartedUpload) -> dict[str, Any]:
    file = None
    if upload.result is not None:
        called = caller.calls(upload.tenant_id, upload.owner, upload.name)
        file = {  # of a model, what `model` in a request may say
            "id": upload.result.get("file") or f"{called}@{upload.result['version']}",
            "object": "file",
            "bytes": upload.num_bytes,
            "created_at": upload.result["created"],
            "filename": upload.filename,
            "purpose": upload.purpose,
            "status": "processed",
            "sha256": upload.result["sha256"],
        }
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.num_bytes,
        "created_at": upload.created,
        "expires_at": upload.expires,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file,
    }


@router.post(
    "", openapi_extra=raises(InvalidName, NameConflict, NotFound, ArtifactTooLarge, RateLimited, StorageFull, Draining)
)
async def create_upload(body: UploadIn, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Begins an upload; parts follow."""
    services.refuse_if_draining()
    if body.purpose == FOR_A_JOB:
        check_filename(body.filename)
        to = Destination(caller.tenant, "", str(caller))
    elif body.filename.endswith(SUFFIX):
        to = destination(services, caller, body.filename.removesuffix(SUFFIX), body.activate, ALWAYS)
    else:
        raise InvalidName(f"{body.filename[:200]!r} must be NAME{SUFFIX}, for the model NAME", param="filename")
    largest(services, to, body.bytes)
    create = partial(services.parts.create, to, filename=body.filename, purpose=body.purpose, num_bytes=body.bytes)
    return _card(caller, await asyncio.to_thread(create))


@router.get("/{upload_id}", openapi_extra=raises(NotFound))
async def get_upload(upload_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """With the parts that are here, to go on where it was interrupted."""

    def look() -> dict[str, Any]:
        upload = services.parts.uploads.find(caller, upload_id)
        return {
            **_card(caller, upload),
            "parts": [_part(upload, part) for part in services.parts.uploads.parts(upload)],
        }

    return await asyncio.to_thread(look)


@router.post(
    "/{upload_id}/parts",
    openapi_extra={
        "requestBody": {"required": True, "content": A_FORM},
        **raises(NotFound, UploadClosed, ArtifactTooLarge, RateLimited, StorageFull, Draining),
    },
)
async def add_part(upload_id: str, http: Request, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """A form with the field `data`, 64 MiB at most; in any order, several at once. The same bytes are the same part.
    Acknowledged when it is safe on disk."""
    services.refuse_if_draining()
    upload = await asyncio.to_thread(services.parts.uploads.find, caller, upload_id)
    http.state.max_body_bytes = MAX_PART_BYTES + OVERHEAD_BYTES
    in_pool = partial(asyncio.get_running_loop().run_in_executor, services.upload_pool)
    with services.parts.receiving(upload):
        file = await in_pool(services.parts.begin, upload)
        try:
            form = OneFile(http.headers.get("content-type", ""), "data", file.write)
            await in_pieces(http, partial(in_pool, form.feed))
            form.end()
            return _part(upload, await in_pool(services.parts.keep, upload, file))
        finally:
            await asyncio.shield(in_pool(file.close))


@router.post("/{upload_id}/complete", openapi_extra=raises(*REFUSALS, CheckpointError, UploadClosed, Draining))
async def complete_upload(upload_id: str, body: CompleteIn, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The parts become a version of the model, checked as by PUT /v1/deltas/{name}, or a file. Of a completed upload:
    what it became. Where something is wrong with it the upload stays as it was."""
    services.refuse_if_draining()
    complete = partial(services.parts.complete, caller, upload_id, body.part_ids, md5=body.md5, sha256=body.sha256)
    upload = await asyncio.get_running_loop().run_in_executor(services.upload_pool, complete)
    await asyncio.to_thread(services.keep_pinned)
    return _card(caller, upload)


@router.post("/{upload_id}/cancel", openapi_extra=raises(NotFound, UploadClosed, StorageFull))
async def cancel_upload(upload_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The parts go; no more can be added."""
    return _card(caller, await asyncio.to_thread(services.parts.cancel, caller, upload_id))
