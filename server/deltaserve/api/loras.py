"""Artifacts under --import-root by the routes that operators know: vLLM's /v1/load_lora_adapter and
/v1/unload_lora_adapter, Dynamo's /v1/loras."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import Field

from deltaserve.api.deltas import destination, largest
from deltaserve.api.deps import CallerDep, Services, ServicesDep
from deltaserve.api.openapi import REFUSALS, raises
from deltaserve.api.schemas import Text, Wire, example
from deltaserve.deltas.store import Destination, Stored
from deltaserve.errors import BadRequest, Draining, ModelNotFound, NameConflict, StorageFull, VersionInUse
from deltaserve.tenants.models import ALWAYS

router = APIRouter(prefix="/v1")


class LoadIn(Wire):
    """`lora_path`: a delta artifact under --import-root. `load_inplace`: a new version where the name is taken."""

    model_config = example(lora_name="acme", lora_path="acme.safetensors", load_inplace=True)

    lora_name: Text
    lora_path: Annotated[Text, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadIn(Wire):
    model_config = example(lora_name="acme")

    lora_name: Text
    lora_int_id: int | None = None  # vLLM's, of no meaning here


@router.post(
    "/load_lora_adapter", response_class=PlainTextResponse, openapi_extra=raises(*REFUSALS, NameConflict, Draining)
)
async def load_lora_adapter(body: LoadIn, services: ServicesDep, caller: CallerDep) -> str:
    """A copy of the file becomes a version of the model, checked as by PUT /v1/deltas/{name}."""
    services.refuse_if_draining()
    to = destination(services, caller, body.lora_name, True, ALWAYS)
    before = await asyncio.to_thread(services.store.models.living, to.owner.id, to.name)
    if before and not body.load_inplace:
        raise NameConflict(f"{body.lora_name!r} is loaded already; load_inplace replaces it", param="lora_name")
    await asyncio.get_running_loop().run_in_executor(services.upload_pool, _copy, services, to, body.lora_path)
    await asyncio.to_thread(services.keep_pinned)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post(
    "/unload_lora_adapter",
    response_class=PlainTextResponse,
    openapi_extra=raises(ModelNotFound, VersionInUse, StorageFull),
)
async def unload_lora_adapter(body: UnloadIn, services: ServicesDep, caller: CallerDep) -> str:
    """The model goes with every version; running requests finish. The file under --import-root stays."""
    await asyncio.to_thread(services.store.delete, caller, body.lora_name)
    await asyncio.to_thread(services.keep_pinned)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


class SourceIn(Wire):
    uri: Annotated[Text, Field(min_length=1, max_length=4096)]  # file:///PATH, s3://BUCKET/KEY


class LoraIn(Wire):
    """`source.uri`: file:// and the path of a delta artifact, or s3:// and its key, under --import-root."""

    model_config = example(lora_name="acme", source={"uri": "file:///imports/acme.safetensors"})

    lora_name: Text
    source: SourceIn


@router.post("/loras", openapi_extra=raises(*REFUSALS, Draining))
async def add_lora(body: LoraIn, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """A copy of the file becomes a version of the model; the same bytes are the version that they were."""
    services.refuse_if_draining()
    uri = urlsplit(body.source.uri)
    if uri.scheme != "s3" and (uri.scheme != "file" or uri.netloc not in ("", "localhost")):
        raise BadRequest(
            "source.uri is file:///PATH or s3://BUCKET/KEY under --import-root; nothing else is fetched", param="source"
        )
    to = destination(services, caller, body.lora_name, True, ALWAYS)
    path = body.source.uri if uri.scheme == "s3" else unquote(uri.path)
    stored = await asyncio.get_running_loop().run_in_executor(services.upload_pool, _copy, services, to, path)
    await asyncio.to_thread(services.keep_pinned)
    return _told(body.lora_name, stored.model.id, "loaded")


@router.get("/loras")
async def list_loras(services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Every model that the caller may see, and its number."""
    models = await asyncio.to_thread(services.store.models.visible, caller)
    return {
        "status": "success",
        "count": len(models),
        "loras": {model.called_by(caller): model.id for model in models},
    }


@router.delete("/loras/{lora_name}", openapi_extra=raises(ModelNotFound, VersionInUse, StorageFull))
async def remove_lora(lora_name: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The model goes with every version; running requests finish. The file under --import-root stays."""
    model, _ = await asyncio.to_thread(services.store.models.owned, caller, lora_name)
    await asyncio.to_thread(services.store.delete, caller, lora_name)
    await asyncio.to_thread(services.keep_pinned)
    return _told(lora_name, model.id, "unloaded")


def _told(name: str, number: int, what: str) -> dict[str, Any]:
    message = f"LoRA adapter '{name}' {what} successfully"
    return {"status": "success", "message": message, "lora_name": name, "lora_id": number}


def _copy(services: Services, to: Destination, path: str) -> Stored:
    with services.imports.open(path) as source:
        most = largest(services, to, source.num_bytes)
        with services.gate.upload(to.owner.id, to.owner.limits, source.num_bytes):
            upload = services.intake.begin(most)
            try:
                for piece in source.pieces:
                    upload.write(piece)
                return services.intake.accept(to, upload, None)
            finally:
                upload.close()
