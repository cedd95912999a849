"""What comes back: an HTTP response becomes a value, pieces of text, or one of the errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

import httpx

from deltaserve_client.errors import (
    ApiError,
    ConnectionFailed,
    StreamFailed,
    StreamTruncated,
    UnexpectedReply,
    class_for_status,
)
from deltaserve_client.sse import SseDecoder
from deltaserve_client.types import Choice, Json, take_dicts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

DONE = b"[DONE]"
EXCERPT_CHARS = 200


def one(from_json: Callable[[Json], T]) -> Callable[[httpx.Response], T]:
    return lambda response: from_json(_object(response.content))


def listed(from_json: Callable[[Json], T]) -> Callable[[httpx.Response], list[T]]:
    return lambda response: [from_json(item) for item in take_dicts(_object(response.content), "data")]


def nothing(response: httpx.Response) -> None:
    """For replies that say all in their status."""


class TextPieces:
    """Reads one text stream: fed with its bytes, gives the text as it grows.

    Raises `StreamFailed` for an error that the server sends inside the stream. `end` must be called when the
    bytes stop, and raises `StreamTruncated` unless the stream said `[DONE]`: a cut answer never looks complete.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._request_id = response.headers.get("x-request-id")
        self._decoder = SseDecoder()
        self._is_done = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        # One at a time: the text that came in the same chunk as an error is given before the error is raised.
        for event in self._decoder.feed(chunk):
            yield from self._texts(event)

    def end(self, cause: httpx.RequestError | None = None) -> None:
        if not self._is_done:
            reason = "the server closed it" if cause is None else _reason(cause)
            raise StreamTruncated(f"stream ended without [DONE]: {reason}") from cause

    def _texts(self, event: bytes) -> list[str]:
        if self._is_done or event == DONE:
            self._is_done = True
            return []
        chunk = _object(event)
        if "error" in chunk:
            raise _api_error(StreamFailed, chunk, 200, self._request_id, None)
        choices = take_dicts(chunk, "choices")  # empty in the chunk that carries the usage
        if len(choices) > 1 or any(choice.get("index", 0) != 0 for choice in choices):
            raise UnexpectedReply("stream with several choices: their text cannot be told apart, ask for one")
        return [text for choice in choices if (text := Choice.from_json(choice).text)]


def connection_failed(call: object, error: httpx.RequestError) -> ConnectionFailed:
    never_sent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
    return ConnectionFailed(f"{call} to {error.request.url.host}: {_reason(error)}", maybe_ran=not never_sent)


def error_of(response: httpx.Response) -> ApiError:
    """The error that a response without success stands for, whoever wrote it: the server or a proxy before it."""
    kind, status = class_for_status(response.status_code), response.status_code
    retry_after = response.headers.get("retry-after", "")
    retry_after_s = int(retry_after) if retry_after.isdecimal() else None
    try:
        body = _object(response.content)
    except UnexpectedReply:
        excerpt = response.text.strip()[:EXCERPT_CHARS]
        body = {"error": {"message": excerpt or response.reason_phrase or "no message", "code": f"http_{status}"}}
    return _api_error(kind, body, status, response.headers.get("x-request-id"), retry_after_s)


def _api_error(
    kind: type[ApiError], body: Json, status: int, request_id: str | None, retry_after_s: int | None
) -> ApiError:
    error = body.get("error")
    fields: Json = error if isinstance(error, dict) else {"message": json.dumps(body)[:EXCERPT_CHARS]}
    param = fields.get("param")
    return kind(
        str(fields.get("message") or "no message"),
        status=status,
        code=str(fields.get("code") or f"http_{status}"),
        param=None if param is None else str(param),
        request_id=request_id,
        retry_after_s=retry_after_s,
    )


def _object(content: bytes) -> Json:
    try:
        value = json.loads(content.decode())
    except ValueError as error:
        raise UnexpectedReply(f"not JSON: {content[:EXCERPT_CHARS]!r}") from error
    if not isinstance(value, dict):
        raise UnexpectedReply(f"not a JSON object: {content[:EXCERPT_CHARS]!r}")
    return value


def _reason(error: httpx.RequestError) -> str:
    return str(error) or type(error).__name__  # httpx's timeouts carry no message
