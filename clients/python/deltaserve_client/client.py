"""The blocking client. What it sends and how replies are read is in `calls`; here is only the sending."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx

from deltaserve_client import calls, checkpoint, replies
from deltaserve_client.artifact import Artifact
from deltaserve_client.errors import ApiError, ConnectionFailed, Unavailable
from deltaserve_client.retry import Attempts

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Iterator, Sequence

    from deltaserve_client.artifact import Progress
    from deltaserve_client.types import Completion, Compression, Delta, Json, Model, Version

T = TypeVar("T")


class Client:
    """A connection to one server; use it as a context manager, or call `close`.

    `api_key` None means the environment's DELTASERVE_API_KEY. `retries` bounds how often one request is sent again,
    which happens only where that is harmless (the table in `retry`). Every method raises a `DeltaServeClientError`.
    """

    def __init__(
        self,
        base_url: str = calls.DEFAULT_URL,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = calls.DEFAULT_TIMEOUT,
        *,
        transport: httpx.BaseTransport | None = None,
        retries: int = calls.DEFAULT_RETRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = httpx.Client(transport=transport, **calls.connection(base_url, api_key, timeout))
        self._retries = retries
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def upload(self, name: str, path: str | os.PathLike[str], *, progress: Progress | None = None) -> Delta:
        """Store the artifact at `path` under `name`: a new name, or a new version of it.

        `progress(sent_bytes, total_bytes)` is called as the file goes out, from 0 again when the upload is repeated.
        Raises OSError when the file cannot be read.
        """
        artifact = Artifact.measure(path)
        return self._ask(calls.upload(name, artifact), lambda: artifact.body(progress))

    def deltas(self) -> list[Delta]:
        return self._ask(calls.deltas())

    def delta(self, name: str) -> Delta:
        return self._ask(calls.delta(name))

    def delete(self, name: str) -> None:
        self._ask(calls.delete(name))

    def compress(
        self, name: str, directory: str | os.PathLike[str], *, progress: Progress | None = None, **options: Any
    ) -> Compression:
        """Uploads a fine-tune's directory (a checkpoint or a PEFT adapter) for the server to compress under `name`.

        The job that `wait` follows. `options`: codec, bits, rank, energy, max_kl, seed, activate; or keep with `data`,
        a file of rows; `calibration`, a file of texts. `progress(sent_bytes, total_bytes)`. Raises OSError.
        """
        return self._follow(checkpoint.compress(name, directory, options, progress))

    def wait(self, job: Compression | str, *, progress: Callable[[Compression], None] | None = None) -> Compression:
        """The job when it has ended, well or not; `progress(job)` is called every second."""
        return self._follow(checkpoint.wait(job if isinstance(job, str) else job.id, progress))

    def compression(self, job_id: str) -> Compression:
        return self._ask(calls.compression(job_id))

    def compressions(self) -> list[Compression]:
        return self._ask(calls.compressions())

    def compression_events(self, job_id: str) -> list[Json]:
        return self._ask(calls.compression_events(job_id))

    def cancel_compression(self, job_id: str) -> Compression:
        return self._ask(calls.cancel_compression(job_id))

    def models(self) -> list[Model]:
        return self._ask(calls.models())

    def complete(self, model: str, prompt: str, **options: Any) -> Completion:
        """`options` are the fields of the OpenAI request: max_tokens, temperature, stop…"""
        return self._ask(calls.complete(model, prompt, options))

    def chat(self, model: str, messages: Sequence[Json], **options: Any) -> Completion:
        return self._ask(calls.chat(model, messages, options))

    def stream(self, model: str, prompt: str, **options: Any) -> Generator[str, None, None]:
        """Pieces of the text as they are made. The request is sent when the first piece is asked for."""
        return self._pieces(calls.stream(model, prompt, options))

    def stream_chat(self, model: str, messages: Sequence[Json], **options: Any) -> Generator[str, None, None]:
        """As `stream`."""
        return self._pieces(calls.stream_chat(model, messages, options))

    def health(self) -> bool:
        """True when the server takes requests, False when it drains or its engine is dead."""
        try:
            self._ask(calls.health())
        except Unavailable:
            return False
        return True

    def version(self) -> Version:
        return self._ask(calls.version())

    def request(self, method: str, path: str, body: Json | None = None, params: dict[str, str] | None = None) -> Json:
        """Any route that answers with a JSON object, such as the admin API's."""
        return self._ask(calls.request(method, path, body, params))

    def _follow(self, steps: checkpoint.Steps) -> Compression:
        go_on: Callable[[], calls.Call[Any] | float] = partial(next, steps)
        while True:
            try:
                step = go_on()
            except StopIteration as end:
                done: Compression = end.value
                return done
            if isinstance(step, float):
                self._sleep(step)
                go_on = partial(next, steps)
                continue
            try:
                go_on = partial(steps.send, self._ask(step))
            except ApiError as refusal:
                go_on = partial(steps.throw, refusal)

    def _ask(self, call: calls.Call[T], body: Callable[[], Iterator[bytes]] | None = None) -> T:
        return call.parse(self._send(call, body, is_stream=False))

    def _pieces(self, call: calls.Call[replies.TextPieces]) -> Generator[str, None, None]:
        with closing(self._send(call, None, is_stream=True)) as response:
            pieces = call.parse(response)
            try:
                for chunk in response.iter_bytes():
                    yield from pieces.feed(chunk)
            except httpx.RequestError as error:
                pieces.end(error)
            else:
                pieces.end()

    def _send(
        self, call: calls.Call[T], body: Callable[[], Iterator[bytes]] | None, *, is_stream: bool
    ) -> httpx.Response:
        """The response of the first try that succeeds; open when `is_stream`, read otherwise."""
        attempts = Attempts(call.repeat, self._retries)
        while True:
            try:
                return self._try_once(call, body() if body else call.content, is_stream)
            except (ConnectionFailed, ApiError) as error:
                wait_s = attempts.wait_s_or_none(error)
                if wait_s is None:
                    raise
            self._sleep(wait_s)

    def _try_once(
        self, call: calls.Call[T], content: Iterator[bytes] | bytes | None, is_stream: bool
    ) -> httpx.Response:
        request = self._http.build_request(
            call.method, call.path, params=call.params, headers=call.headers, content=content
        )
        try:
            response = self._http.send(request, stream=is_stream)
            if response.is_success:
                return response
            with closing(response):
                response.read()
        except httpx.RequestError as error:
            raise replies.connection_failed(call, error) from error
        raise replies.error_of(response)
