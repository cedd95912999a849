"""GET /v1/models, GET and DELETE /v1/models/{id}: the base and every delta by name."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from deltaserve.api.deps import Services, ServicesDep
from deltaserve.deltas.store import Record
from deltaserve.errors import NameConflict

router = APIRouter()


def _card(services: Services, record: Record | None) -> dict[str, Any]:
    return {
        "id": record.name if record else services.base_id,
        "object": "model",
        "created": record.created if record else services.created,
        "owned_by": "deltaserve",
        "root": record.name if record else services.base_id,
        "parent": services.base_id if record else None,
        "max_model_len": services.max_model_len,
    }


@router.get("/v1/models")
async def list_models(services: ServicesDep) -> dict[str, Any]:
    records = await asyncio.to_thread(services.store.records)
    return {"object": "list", "data": [_card(services, record) for record in (None, *records)]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, services: ServicesDep) -> dict[str, Any]:
    if model == services.base_id:
        return _card(services, None)
    return _card(services, await asyncio.to_thread(services.store.get, model))


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, services: ServicesDep) -> dict[str, Any]:
    if model == services.base_id:
        raise NameConflict(f"{model} is the base model and stays", param="model")
    await asyncio.to_thread(services.store.delete, model)
    return {"id": model, "object": "model", "deleted": True}
