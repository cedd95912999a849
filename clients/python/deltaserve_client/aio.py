"""The asyncio client: `Client` with `await`. What it sends and how replies are read is in `calls`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx

from deltaserve_client import calls, checkpoint, replies
from deltaserve_client.artifact import Artifact
from deltaserve_client.errors import ApiError, ConnectionFailed, Unavailable
from deltaserve_client.retry import Attempts

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

    from deltaserve_client.artifact import Progress
    from deltaserve_client.types import Completion, Compression, Delta, Json, Model, Version

T = TypeVar("T")


class AsyncClient:
    """As `Client`, method for method; `aclose` instead of `close`."""

    def __init__(
        self,
        base_url: str = calls.DEFAULT_URL,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = calls.DEFAULT_TIMEOUT,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        retries: int = calls.DEFAULT_RETRIES,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = httpx.AsyncClient(transport=transport, **calls.connection(base_url, api_key, timeout))
        self._retries = retries
        self._sleep = sleep

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def upload(self, name: str, path: str | os.PathLike[str], *, progress: Progress | None = None) -> Delta:
        artifact = await asyncio.to_thread(Artifact.measure, path)
        return await self._ask(calls.upload(name, artifact), lambda: artifact.async_body(progress))

    async def deltas(self) -> list[Delta]:
        return await self._ask(calls.deltas())

    async def delta(self, name: str) -> Delta:
        return await self._ask(calls.delta(name))

    async def delete(self, name: str) -> None:
        await self._ask(calls.delete(name))

    async def compress(
        self, name: str, directory: str | os.PathLike[str], *, progress: Progress | None = None, **options: Any
    ) -> Compression:
        return await self._follow(checkpoint.compress(name, directory, options, progress))

    async def wait(
        self, job: Compression | str, *, progress: Callable[[Compression], None] | None = None
    ) -> Compression:
        return await self._follow(checkpoint.wait(job if isinstance(job, str) else job.id, progress))

    async def compression(self, job_id: str) -> Compression:
        return await self._ask(calls.compression(job_id))

    async def compressions(self) -> list[Compression]:
        return await self._ask(calls.compressions())

    async def compression_events(self, job_id: str) -> list[Json]:
        return await self._ask(calls.compression_events(job_id))

    async def cancel_compression(self, job_id: str) -> Compression:
        return await self._ask(calls.cancel_compression(job_id))

    async def models(self) -> list[Model]:
        return await self._ask(calls.models())

    async def complete(self, model: str, prompt: str, **options: Any) -> Completion:
        return await self._ask(calls.complete(model, prompt, options))

    async def chat(self, model: str, messages: Sequence[Json], **options: Any) -> Completion:
        return await self._ask(calls.chat(model, messages, options))

    def stream(self, model: str, prompt: str, **options: Any) -> AsyncGenerator[str, None]:
        """To leave the loop early and have the server stop at once, hold it in `contextlib.aclosing`."""
        return self._pieces(calls.stream(model, prompt, options))

    def stream_chat(self, model: str, messages: Sequence[Json], **options: Any) -> AsyncGenerator[str, None]:
        """As `stream`."""
        return self._pieces(calls.stream_chat(model, messages, options))

    async def health(self) -> bool:
        try:
            await self._ask(calls.health())
        except Unavailable:
            return False
        return True

    async def version(self) -> Version:
        return await self._ask(calls.version())

    async def request(
        self, method: str, path: str, body: Json | None = None, params: dict[str, str] | None = None
    ) -> Json:
        return await self._ask(calls.request(method, path, body, params))

    async def _follow(self, steps: checkpoint.Steps) -> Compression:
        go_on: Callable[[], calls.Call[Any] | float] = partial(next, steps)
        while True:
            try:
                step = go_on()
            except StopIteration as end:
                done: Compression = end.value
                return done
            if isinstance(step, float):
                await self._sleep(step)
                go_on = partial(next, steps)
                continue
            try:
                go_on = partial(steps.send, await self._ask(step))
            except ApiError as refusal:
                go_on = partial(steps.throw, refusal)

    async def _ask(self, call: calls.Call[T], body: Callable[[], AsyncIterator[bytes]] | None = None) -> T:
        return call.parse(await self._send(call, body, is_stream=False))

    async def _pieces(self, call: calls.Call[replies.TextPieces]) -> AsyncGenerator[str, None]:
        async with aclosing(await self._send(call, None, is_stream=True)) as response:
            pieces = call.parse(response)
            try:
                async for chunk in response.aiter_bytes():
                    for text in pieces.feed(chunk):
                        yield text
            except httpx.RequestError as error:
                pieces.end(error)
            else:
                pieces.end()

    async def _send(
        self, call: calls.Call[T], body: Callable[[], AsyncIterator[bytes]] | None, *, is_stream: bool
    ) -> httpx.Response:
        attempts = Attempts(call.repeat, self._retries)
        while True:
            try:
                return await self._try_once(call, body() if body else call.content, is_stream)
            except (ConnectionFailed, ApiError) as error:
                wait_s = attempts.wait_s_or_none(error)
                if wait_s is None:
                    raise
            await self._sleep(wait_s)

    async def _try_once(
        self, call: calls.Call[T], content: AsyncIterator[bytes] | bytes | None, is_stream: bool
    ) -> httpx.Response:
        request = self._http.build_request(
            call.method, call.path, params=call.params, headers=call.headers, content=content
        )
        try:
            response = await self._http.send(request, stream=is_stream)
            if response.is_success:
                return response
            async with aclosing(response):
                await response.aread()
        except httpx.RequestError as error:
            raise replies.connection_failed(call, error) from error
        raise replies.error_of(response)
