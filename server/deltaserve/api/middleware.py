"""Around every request: a key where one is asked for, an id on the reply, a count in the metrics, a bound on the body.

Plain ASGI: streams and disconnects pass.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from deltaserve.api.errors import error_response, unexpected
from deltaserve.errors import AuthenticationFailed, BadRequest
from deltaserve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 32 * 2**20  # of every request but an upload, which has a bound of its own
OPEN_PATHS = frozenset({"/health"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Identify:
    """x-request-id: the caller's own where it is sane, else a new one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid.uuid4().hex
        method = scope["method"] if scope["method"] in METHODS else "other"  # a label's values must be few
        began, started = time.monotonic(), False
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES and method != "PUT":
                raise BadRequest(f"the body is over {MAX_BODY_BYTES} bytes")
            return message

        async def identified(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
                handler = getattr(scope.get("route"), "path", "none")
                self._metrics.http_requests.labels(handler, method, str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, bounded, identified)
        except Exception as error:
            if started:
                raise
            await unexpected(method, scope["path"], error)(scope, receive, identified)
        finally:
            handler = getattr(scope.get("route"), "path", "none")
            self._metrics.http_seconds.labels(handler, method).observe(time.monotonic() - began)


class Authorise:
    """A bearer key for every path but the open ones, before a byte of the body is read or a route is looked up.

    Here and not on the routes, so that none can forget it. Compared as digests, in constant time.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = hashlib.sha256(api_key.encode()).digest() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._allows(Headers(scope=scope)):
            refusal = AuthenticationFailed("a valid key is needed: Authorization: Bearer KEY")
            return await error_response(refusal)(scope, receive, send)
        await self._app(scope, receive, send)

    def _allows(self, headers: Headers) -> bool:
        if self._expected is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        return secrets.compare_digest(digest, self._expected) and scheme.lower() == "bearer"
