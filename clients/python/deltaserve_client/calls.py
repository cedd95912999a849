"""The requests of the HTTP contract, one function each, and the settings of a connection.

Says what is sent and how the reply is read; sends nothing itself, so `Client` and `AsyncClient` share all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from deltaserve_client import replies
from deltaserve_client.errors import InvalidArgument
from deltaserve_client.retry import Repeat
from deltaserve_client.types import Completion, Compression, Delta, Json, Model, Version

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


def begin_upload(filename: str, num_bytes: int) -> Call[Json]:
    """Of a file that a job will read. Sent twice it begins two; the one without parts expires."""
    body = {"filename": filename, "bytes": num_bytes, "mime_type": "application/octet-stream", "purpose": "user_data"}
    return _post("/v1/uploads", body, replies.one(dict))


def add_part(upload_id: str, data: bytes) -> Call[Json]:
    boundary = hashlib.sha256(data).hexdigest()
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="data"; filename="part"\r\n\r\n'.encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    content = b"".join((head, data, f"\r\n--{boundary}--\r\n".encode()))
    return Call("POST", f"/v1/uploads/{_segment(upload_id)}/parts", replies.one(dict), headers=headers, content=content)


def complete_upload(upload_id: str, part_ids: Sequence[str], sha256: str) -> Call[Json]:
    body = {"part_ids": list(part_ids), "sha256": sha256}
    return _post(f"/v1/uploads/{_segment(upload_id)}/complete", body, replies.one(dict))


def delete_file(file_id: str) -> Call[None]:
    return Call("DELETE", f"/v1/files/{_segment(file_id)}", replies.nothing, Repeat.IF_NOT_RUN)


def create_compression(body: Json, key: str) -> Call[Compression]:
    """`key`: sent twice it is one job."""
    return _post("/v1/compressions", body, replies.one(Compression.from_json), {"idempotency-key": key})


def compression(job_id: str) -> Call[Compression]:
    return Call("GET", f"/v1/compressions/{_segment(job_id)}", replies.one(Compression.from_json))


def compressions() -> Call[list[Compression]]:
    return Call("GET", "/v1/compressions", replies.listed(Compression.from_json), params={"limit": "100"})


def cancel_compression(job_id: str) -> Call[Compression]:
    return _post(f"/v1/compressions/{_segment(job_id)}/cancel", {}, replies.one(Compression.from_json))


def compression_events(job_id: str) -> Call[list[Json]]:
    return Call("GET", f"/v1/compressions/{_segment(job_id)}/events", replies.listed(dict))


def request(method: str, path: str, body: Json | None, params: dict[str, str] | None) -> Call[Json]:
    """Any route that answers with a JSON object; `path` is percent-encoded already, and may end with a query."""
    path, _, asked = path.partition("?")
    query = dict(httpx.QueryParams(asked))
    headers = {} if body is None else {"content-type": "application/json"}
    content = None if body is None else json.dumps(body, allow_nan=False).encode()
    repeat = Repeat.ALWAYS if method == "GET" else Repeat.IF_NOT_RUN
    return Call(method, path, replies.one(dict), repeat, query | (params or {}), headers, content)


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


def _post(
    path: str, body: Json, parse: Callable[[httpx.Response], T], headers: dict[str, str] | None = None
) -> Call[T]:
    """One that may be sent twice."""
    try:
        content = json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{path}: the request cannot be written as JSON: {error}") from error
    return Call("POST", path, parse, headers={"content-type": "application/json", **(headers or {})}, content=content)


def _delta_path(name: str) -> str:
    return f"/v1/deltas/{_segment(name)}"


def _segment(name: str) -> str:
    if not name:
        raise InvalidArgument("name: must not be empty")
    try:
        encoded = quote(name, safe="")
    except UnicodeEncodeError as error:  # a file name that is not UTF-8 arrives like this
        raise InvalidArgument(f"name {name!r}: not Unicode text") from error
    if name in (".", ".."):
        encoded = name.replace(".", "%2E")  # quote() leaves dots, and a path with `/..` would name its parent
    return encoded
