"""GET /health, open to all; GET /version, for every key; GET /metrics, for those that may see every tenant."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from deltaserve.api.deps import ServicesDep

open_router = APIRouter()
router = APIRouter()
metrics_router = APIRouter()


@open_router.get(
    "/health", response_class=Response, responses={503: {"description": "draining, or the engine is dead"}}
)
async def health(services: ServicesDep) -> Response:
    """Empty 200; 503 while draining, or when the engine is dead."""
    return Response(status_code=200 if services.engine.is_alive and not services.draining else 503)


@router.get("/version")
async def version(services: ServicesDep) -> dict[str, Any]:
    """What runs: versions, base, device, type, kernels."""
    return services.runtime


@metrics_router.get("/metrics", response_class=PlainTextResponse)
def metrics(services: ServicesDep) -> Response:
    """In the text format of Prometheus."""
    return Response(services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
