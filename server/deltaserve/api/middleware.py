"""Around every request: a key where one is asked for, an id on the reply, a count in the metrics, bounds on the body.

Plain ASGI: streams and disconnects pass.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from deltaserve.api.errors import error_response, unexpected
from deltaserve.errors import AuthenticationFailed, BadRequest, RateLimited, RegistryUnavailable, RequestTimeout
from deltaserve.metrics import Metrics
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.limits import Gate

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEAST_BYTES_PER_S = 1024  # of a body, once the client was waited for as long as it may pause
MAX_BODY_BYTES = 32 * 2**20  # of every request whose handler sets no other `max_body_bytes` in its state
OPEN_PATHS = frozenset({"/health"})
COUNTED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})  # where a tenant's requests a minute are
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Identify:
    """x-request-id: the caller's own where it is sane, else a new one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, patience_s: float) -> None:
        self._app = app
        self._metrics = metrics
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        state["reply_headers"] = {}  # what handlers add, to errors too
        state["max_body_bytes"] = MAX_BODY_BYTES
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid.uuid4().hex
        method = scope["method"] if scope["method"] in METHODS else "other"  # a label's values must be few
        began, started = time.monotonic(), False
        num_bytes, waited_s, is_whole = 0, 0.0, False

        async def bounded() -> Message:
            nonlocal num_bytes, waited_s, is_whole
            if is_whole:  # what comes now is the end of the connection
                return await receive()
            asked = time.monotonic()
            try:
                async with asyncio.timeout(self._patience_s):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(f"nothing of the body came for {self._patience_s} s") from None
            waited_s += time.monotonic() - asked
            is_whole = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if waited_s > self._patience_s and num_bytes < waited_s * LEAST_BYTES_PER_S and not is_whole:
                raise RequestTimeout(f"the body came at less than {LEAST_BYTES_PER_S} bytes a second")
            if num_bytes > state["max_body_bytes"]:
                raise BadRequest(f"the body is over {state['max_body_bytes']} bytes")
            return message

        async def identified(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(scope["state"]["reply_headers"])
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


class Authenticate:
    """Whose key it is, for every path but the open ones, before a byte of the body is read or a route is looked up; and
    whether its tenant may send one: its requests a minute, and what it has in memory already.

    Here and not on the routes, so that none can forget it. Leaves the caller in the request's state.
    """

    def __init__(self, app: ASGIApp, keys: Keys, gate: Gate) -> None:
        self._app = app
        self._keys = keys
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        state = scope["state"]
        try:
            if self._keys.may_be_stale:
                await asyncio.to_thread(self._keys.refresh)
            caller = state["caller"] = self._keys.authenticate(_bearer(Headers(scope=scope)))
            if scope["path"] in COUNTED_PATHS:
                self._gate.refuse_if_empty(caller.tenant.id, caller.tenant.limits, state["reply_headers"])
        except (AuthenticationFailed, RegistryUnavailable, RateLimited) as refusal:
            return await error_response(refusal)(scope, receive, send)
        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            if size and state["max_body_bytes"] <= MAX_BODY_BYTES:  # larger ones go to the disk, piece by piece
                self._gate.hold(caller.tenant.id, size)
                held += size
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._gate.hold(caller.tenant.id, -held)


def _bearer(headers: Headers) -> str | None:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else None
