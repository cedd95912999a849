"""Around every request: an id on the reply, a count in the metrics. Plain ASGI, so that streams and disconnects pass."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from deltaserve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


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

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                handler = getattr(scope.get("route"), "path", "none")
                self._metrics.http_requests.labels(handler, scope["method"], str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, identified)
