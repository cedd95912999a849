"""/v1/compressions: jobs that make a model of an uploaded checkpoint or adapter. The objects are like OpenAI's
fine-tuning jobs."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from pydantic import Field

from deltaserve.api.deltas import destination
from deltaserve.api.deps import CallerDep, Services, ServicesDep
from deltaserve.api.openapi import raises
from deltaserve.api.schemas import Text, Wire, example
from deltaserve.errors import (
    BadRequest,
    CheckpointError,
    CodecError,
    Draining,
    InvalidName,
    JobClosed,
    NameConflict,
    NotFound,
    RateLimited,
    StorageFull,
    TemplateError,
)
from deltaserve.tenants.accounts import Caller
from deltaserve.tenants.jobs import Asked, Job, JobEvent
from deltaserve.tenants.models import ALWAYS

router = APIRouter(prefix="/v1/compressions")
FileId = Annotated[Text, Field(max_length=128)]
RECIPE = ("codec", "bits", "rank", "energy", "keep", "max_kl", "scoring", "seed")


class CompressionIn(Wire):
    """`files`: of one checkpoint (safetensors, config.json, tokenizer.json, …) or one PEFT adapter. `name`: the
    model's. At most one of bits, rank, energy, keep, max_kl, as of `deltaserve compress`; none: about 0.05 nats from
    the fine-tune. `data`: a file of rows {prompt, answer}, for keep. `calibration`: a file of texts."""

    model_config = example(name="acme", files=["file-3f2a", "file-90bc"], max_kl=0.05)

    name: Text
    files: Annotated[list[FileId], Field(min_length=1, max_length=1000)]
    codec: Annotated[Text, Field(max_length=64)] | None = None
    bits: Annotated[float, Field(gt=0, le=32)] | None = None
    rank: Annotated[int, Field(ge=1, le=65536)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    max_kl: Annotated[float, Field(gt=0, le=100)] | None = None
    scoring: Literal["exact", "last-number"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: FileId | None = None
    calibration: FileId | None = None
    activate: bool = True

    def asked(self, name: str) -> Asked:
        """Raises BadRequest for what does not go together."""
        if (self.keep is None) != (self.data is None):
            raise BadRequest("`keep` and `data` need each other", param="data")
        if self.scoring is not None and self.keep is None:
            raise BadRequest("`scoring` says when `keep` finds an answer right: it needs `keep`", param="scoring")
        texts = {key: file for key in ("data", "calibration") if (file := getattr(self, key)) is not None}
        if len({*self.files, *texts.values()}) < len(self.files) + len(texts):
            raise BadRequest("a file is named twice", param="files")
        recipe = {key: value for key in RECIPE if (value := getattr(self, key)) is not None}
        return Asked(name, self.files, texts, recipe, self.activate)


def _card(services: Services, caller: Caller, job: Job) -> dict[str, Any]:
    called = caller.calls(job.tenant_id, job.owner, job.name)
    left = (job.progress or {}).get("seconds_left")
    return {
        "id": job.id,
        "object": "compression",
        "created_at": job.created,
        "started_at": job.started,
        "finished_at": job.ended,
        "estimated_finish": None if left is None else int(time.time()) + left,
        "status": job.status,
        "name": called,
        "model": f"{called}@{job.result['version']}" if job.result else None,  # what `model` in a request may say
        "base": services.base_id,
        "files": job.asked["files"],
        **dict.fromkeys(RECIPE),
        **job.asked["recipe"],
        **{key: job.asked["texts"].get(key) for key in ("data", "calibration")},
        "activate": job.activates,
        "attempts": job.attempts,
        "progress": job.progress,
        "result": job.result,
        "error": {**job.error, "param": None} if job.error else None,
    }


def _event(job: Job, event: JobEvent) -> dict[str, Any]:
    return {
        "id": f"{job.id}-{event.number}",
        "object": "compression.event",
        "created_at": event.at,
        "level": event.level,
        "message": event.message,
    }


@router.post(
    "",
    status_code=202,
    openapi_extra=raises(
        *(InvalidName, NameConflict, NotFound, CheckpointError, CodecError, TemplateError),
        *(RateLimited, StorageFull, Draining),
    ),
)
async def create_compression(
    body: CompressionIn,
    services: ServicesDep,
    caller: CallerDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> dict[str, Any]:
    """A job. Names, shapes and types are checked against the base now, numbers when it runs. The same request again,
    or the same Idempotency-Key, is the same job."""
    services.refuse_if_draining()
    to = destination(services, caller, body.name, body.activate, ALWAYS)
    create = partial(services.compressions.create, caller, to.owner, body.asked(to.name), idempotency_key)
    return _card(services, caller, await asyncio.to_thread(create))


@router.get("", openapi_extra=raises(NotFound))
async def list_compressions(
    services: ServicesDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """Newest first; `after` a job's id: those that are older."""

    def jobs() -> list[Job]:
        last = services.compressions.jobs.find(caller, after) if after is not None else None
        return services.compressions.jobs.visible(caller, last, limit + 1)

    found = await asyncio.to_thread(jobs)
    data = [_card(services, caller, job) for job in found[:limit]]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/{compression_id}", openapi_extra=raises(NotFound))
async def get_compression(compression_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """How far it is, and what came of it."""
    return _card(services, caller, await asyncio.to_thread(services.compressions.jobs.find, caller, compression_id))


@router.get("/{compression_id}/events", openapi_extra=raises(NotFound))
async def list_events(compression_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """What happened, oldest first; the first 500."""

    def events() -> list[dict[str, Any]]:
        job = services.compressions.jobs.find(caller, compression_id)
        return [_event(job, event) for event in services.compressions.jobs.events(job)]

    return {"object": "list", "data": await asyncio.to_thread(events), "has_more": False}


@router.post("/{compression_id}/cancel", openapi_extra=raises(NotFound, JobClosed, StorageFull))
async def cancel_compression(compression_id: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """Its work ends at once and its files go."""
    job = await asyncio.to_thread(services.compressions.cancel, caller, compression_id)
    return _card(services, caller, job)
