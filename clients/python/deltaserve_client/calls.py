"""The requests of the HTTP contract, one function each, and the settings of a connection.

Says what is sent and how the reply is read; sends nothing itself, so `Client` and `AsyncClient` share all of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from deltaserve_client import replies
from deltaserve_client.errors import InvalidArgument
from deltaserve_client.retry import Repeat
from deltaserve_client.types import Completion, Delta, Json, Model, Version

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deltaserve_client.artifact import Artifact

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # a long completion says nothing until it is finished
DEFAULT_RETRIES = 2


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and the reading of its reply. `path` is percent-encoded already."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    repeat: Repeat = Repeat.ALWAYS
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def upload(name: str, artifact: Artifact) -> Call[Delta]:
    return Call(
        "PUT",
        _delta_path(name),
        replies.one(Delta.from_json),
        params={"sha256": artifact.sha256},
        headers={"content-length": str(artifact.size_bytes), "content-type": "application/octet-stream"},
    )


def deltas() -> Call[list[Delta]]:
    return Call("GET", "/v1/deltas", replies.listed(Delta.from_json))


def delta(name: str) -> Call[Delta]:
    return Call("GET", _delta_path(name), replies.one(Delta.from_json))


def delete(name: str) -> Call[None]:
    # If the first reply were lost, a second delete would answer 404 to a success.
    return Call("DELETE", _delta_path(name), replies.nothing, Repeat.IF_NOT_RUN)


def models() -> Call[list[Model]]:
    return Call("GET", "/v1/models", replies.listed(Model.from_json))


def complete(model: str, prompt: str, options: Json) -> Call[Completion]:
    return _generation("/v1/completions", replies.one(Completion.from_json), model, {"prompt": prompt}, options)


def chat(model: str, messages: Sequence[Json], options: Json) -> Call[Completion]:
    body = {"messages": list(messages)}
    return _generation("/v1/chat/completions", replies.one(Completion.from_json), model, body, options)


def stream(model: str, prompt: str, options: Json) -> Call[replies.TextPieces]:
    body = {"prompt": prompt, "stream": True}
    return _generation("/v1/completions", replies.TextPieces, model, body, options)


def stream_chat(model: str, messages: Sequence[Json], options: Json) -> Call[replies.TextPieces]:
    body = {"messages": list(messages), "stream": True}
    return _generation("/v1/chat/completions", replies.TextPieces, model, body, options)


def health() -> Call[None]:
    return Call("GET", "/health", replies.nothing, Repeat.NEVER)  # the state now, not after waiting for a better one


def version() -> Call[Version]:
    return Call("GET", "/version", replies.one(Version.from_json))


def request(method: str, path: str, body: Json | None, params: dict[str, str] | None) -> Call[Json]:
    """Any route that answers with a JSON object; `path` is percent-encoded already."""
    headers = {} if body is None else {"content-type": "application/json"}
    content = None if body is None else json.dumps(body, allow_nan=False).encode()
    repeat = Repeat.ALWAYS if method == "GET" else Repeat.IF_NOT_RUN
    return Call(method, path, replies.one(dict), repeat, params or {}, headers, content)


def connection(base_url: str, api_key: str | None, timeout: float | httpx.Timeout) -> dict[str, Any]:
    """The arguments that both of httpx's clients take. Raises `InvalidArgument`."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise InvalidArgument(f"base_url {base_url!r}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidArgument(f"base_url {base_url!r}: expected http://HOST[:PORT] or https://HOST[:PORT]")
    key = os.environ.get("DELTASERVE_API_KEY") if api_key is None else api_key
    if key and not (key.isascii() and key.isprintable()):
        raise InvalidArgument("api_key: has characters that an HTTP header cannot carry")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return {"base_url": url, "headers": headers, "timeout": timeout}


def _generation(path: str, parse: Callable[[httpx.Response], T], model: str, body: Json, options: Json) -> Call[T]:
    if "stream" in options:
        raise InvalidArgument("stream: not an option; call stream() or stream_chat()")
    try:
        text = json.dumps({**options, "model": model, **body}, allow_nan=False, ensure_ascii=False)
        content = text.encode()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{path}: the request cannot be written as JSON: {error}") from error
    headers = {"content-type": "application/json"}
    return Call("POST", path, parse, Repeat.IF_NOT_RUN, headers=headers, content=content)


def _delta_path(name: str) -> str:
    if not name:
        raise InvalidArgument("name: must not be empty")
    try:
        encoded = quote(name, safe="")
    except UnicodeEncodeError as error:  # a file name that is not UTF-8 arrives like this
        raise InvalidArgument(f"name {name!r}: not Unicode text") from error
    if name in (".", ".."):
        encoded = name.replace(".", "%2E")  # quote() leaves dots, and a path with `/..` would name its parent
    return f"/v1/deltas/{encoded}"
