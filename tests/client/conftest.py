"""A client of either kind before a scripted server: the same test body proves `Client` and `AsyncClient`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from deltaserve_client import AsyncClient, Client

Handler = Callable[[httpx.Request], httpx.Response]


@dataclass
class Wire:
    """`ask(handler, method, …)` calls one client method against `handler`; streams come back as a list."""

    is_async: bool
    requests: list[httpx.Request] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def ask(self, handler: Handler | httpx.Response, method: str, *args: Any, **options: Any) -> Any:
        def record(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            return handler if isinstance(handler, httpx.Response) else handler(request)

        if self.is_async:
            return asyncio.run(self._ask_async(record, method, args, options))
        transport = httpx.MockTransport(record)
        with Client(transport=transport, sleep=self.waits_s.append, **self.settings) as client:
            result = getattr(client, method)(*args, **options)
            return list(result) if "stream" in method else result

    async def _ask_async(self, handler: Handler, method: str, args: Any, options: Any) -> Any:
        async def sleep(wait_s: float) -> None:
            self.waits_s.append(wait_s)

        async with AsyncClient(transport=httpx.MockTransport(handler), sleep=sleep, **self.settings) as client:
            result = getattr(client, method)(*args, **options)
            return [piece async for piece in result] if "stream" in method else await result


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def wire(request: pytest.FixtureRequest) -> Wire:
    return Wire(is_async=request.param)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DELTASERVE_API_KEY", "DELTASERVE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def delta_json() -> dict[str, Any]:
    return {
        "id": "numwords",
        "object": "delta",
        "version": 3,
        "sha256": "ab" * 32,
        "created": 1700000000,
        "codec": "bitdelta",
        "disk_bytes": 1_500_000,
        "resident_bytes": 2_000_000,
        "bits_per_parameter": 1,
        "base": "cd" * 32,
        "state": "device",
        "of_a_newer_server": True,
    }


@pytest.fixture
def model_json() -> dict[str, Any]:
    return {
        "id": "numwords",
        "object": "model",
        "created": 1700000000,
        "owned_by": "deltaserve",
        "root": "numwords",
        "parent": "tiny",
        "max_model_len": 2048,
    }


@pytest.fixture
def completion_json() -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1700000000,
        "model": "numwords",
        "choices": [{"index": 0, "text": " twelve", "finish_reason": "length", "logprobs": None}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    }
