"""GET /v1/models, GET and DELETE /v1/models/{id}: the base, the caller's own models, and those shared with it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from deltaserve.api.deps import CallerDep, Services, ServicesDep
from deltaserve.api.openapi import raises
from deltaserve.api.paging import After, Limit, page
from deltaserve.errors import ModelNotFound, NameConflict, StorageFull, VersionInUse
from deltaserve.tenants.accounts import Caller
from deltaserve.tenants.models import Model

router = APIRouter()
changing = APIRouter()


def _base_card(services: Services) -> dict[str, Any]:
    return _card(services, services.base_id, services.created, "deltaserve", None)


def _model_card(services: Services, model: Model, caller: Caller) -> dict[str, Any]:
    return _card(services, model.called_by(caller), model.active.created, model.owner, services.base_id)


def _card(services: Services, name: str, created: int, owner: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "root": name,
        "parent": parent,
        "max_model_len": services.max_model_len,
    }


@router.get("/v1/models")
async def list_models(
    services: ServicesDep, caller: CallerDep, after: After = None, limit: Limit = None
) -> dict[str, Any]:
    """The base, then one's own by name, then what is shared with one."""

    def listed() -> dict[str, Any]:
        def card(model: Model | None) -> dict[str, Any]:
            return _model_card(services, model, caller) if model else _base_card(services)

        def called(model: Model | None) -> str:
            return model.called_by(caller) if model else services.base_id

        return page([None, *services.store.models.visible(caller)], called, card, after, limit)

    return await asyncio.to_thread(listed)


@router.get("/v1/models/{model:path}", openapi_extra=raises(ModelNotFound))
async def get_model(model: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """NAME, NAME@VERSION, TENANT:NAME, or the base."""
    if model == services.base_id:
        return _base_card(services)
    found, _ = await asyncio.to_thread(services.store.models.find, caller, model)
    return {**_model_card(services, found, caller), "id": model, "root": model}


@changing.delete(
    "/v1/models/{model:path}", openapi_extra=raises(ModelNotFound, NameConflict, VersionInUse, StorageFull)
)
async def delete_model(model: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """As DELETE /v1/deltas/{name}: new requests find nothing, running ones finish."""
    if model == services.base_id:
        raise NameConflict(f"{model} is the base model and stays", param="model")
    await asyncio.to_thread(services.store.delete, caller, model)
    await asyncio.to_thread(services.keep_pinned)
    return {"id": model, "object": "model", "deleted": True}
