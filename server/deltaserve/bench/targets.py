"""What is measured: an engine in this process, or a server. Both are asked for greedy answers of a fixed length."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import httpx

from deltaserve.api.deps import Services
from deltaserve.bench.offline import caller
from deltaserve.bench.workload import Job
from deltaserve.engine.text import Sink
from deltaserve.engine.types import Event, Request, SamplingParams
from deltaserve.errors import DeltaServeError
from deltaserve.ids import RequestId


@dataclass(frozen=True)
class Sample:
    """One request. Times in seconds since the run began."""

    model: str
    due_s: float
    state: str | None = None  # of its delta when it was due: device, host, disk; None: the base, or not known
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0
    num_cached: int = 0
    error: str | None = None
    group: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


class Target(Protocol):
    async def ask(self, job: Job, began: float) -> Sample: ...


async def play(jobs: Iterable[Job], target: Target) -> list[Sample]:
    """Every job when it is due; → their samples in the order of `jobs`."""
    began = time.perf_counter()

    async def one(job: Job) -> Sample:
        await asyncio.sleep(job.due_s - (time.perf_counter() - began))
        return await target.ask(job, began)

    return await asyncio.gather(*(one(job) for job in jobs))


@dataclass
class EngineTarget:
    """The engine itself: no HTTP."""

    services: Services
    _serial: itertools.count[int] = field(default_factory=itertools.count)

    async def ask(self, job: Job, began: float) -> Sample:
        services, loop = self.services, asyncio.get_running_loop()
        sample = Sample(job.model, job.due_s)
        events: asyncio.Queue[tuple[float, Event]] = asyncio.Queue()
        digest = None if job.model == services.base_id else services.store.lease(caller(services), job.model)[1].digest
        try:
            if digest is not None:
                sample = replace(sample, state=services.residency.state(digest))
            profile = services.text.profile(digest)
            params = SamplingParams(max_tokens=job.max_tokens, temperature=0, ignore_eos=True)
            request = Request(
                id=RequestId(f"bench-{next(self._serial)}"),
                digest=digest,
                prompt_ids=job.prompt,
                params=params,
                eos_ids=profile.eos_ids,
                vocab_size=profile.vocab_size,
                sink=Sink(profile, job.prompt, params),
                emit=lambda event: _put(loop, events, (time.perf_counter() - began, event)),
                arrival_s=time.monotonic(),
            )
            services.engine.submit([request])
            while True:
                now, event = await events.get()
                if event.token_ids:
                    first = now if sample.first_s is None else sample.first_s
                    num_tokens = sample.num_tokens + len(event.token_ids)
                    sample = replace(sample, first_s=first, last_s=now, num_tokens=num_tokens)
                if event.finish_reason is not None:
                    error = event.error.code if event.error else None
                    return replace(sample, num_cached=event.num_cached, error=error)
        except DeltaServeError as error:
            return replace(sample, error=error.code)
        finally:
            if digest is not None:
                services.store.release(digest)


def _put(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[float, Event]], item: tuple[float, Event]
) -> None:
    loop.call_soon_threadsafe(events.put_nowait, item)


@dataclass
class HttpTarget:
    """A server with OpenAI's completions. A token counts when its text is sent."""

    client: httpx.AsyncClient

    async def ask(self, job: Job, began: float) -> Sample:
        sample = Sample(job.model, job.due_s)
        body = {
            "model": job.model,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._post(body) as reply:
                if reply.status_code != 200:
                    return replace(sample, error=str(reply.status_code))
                async for line in reply.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event, now = json.loads(line[6:]), time.perf_counter() - began
                    if "error" in event:
                        return replace(sample, error=str(event["error"].get("code")))
                    if event["choices"]:
                        sample = replace(sample, first_s=now if sample.first_s is None else sample.first_s, last_s=now)
                    if (usage := event.get("usage")) is not None:
                        details = usage.get("prompt_tokens_details") or {}
                        cached = details.get("cached_tokens") or 0
                        sample = replace(sample, num_tokens=usage["completion_tokens"], num_cached=cached)
        except httpx.HTTPError as error:
            return replace(sample, error=type(error).__name__)
        return sample

    def _post(self, body: dict[str, object]) -> AbstractAsyncContextManager[httpx.Response]:
        return self.client.stream("POST", "/v1/completions", json=body)
