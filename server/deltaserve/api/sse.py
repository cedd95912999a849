"""Server-sent events: framing, a mid-stream error as an event, [DONE] at the end of a whole stream only."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi.responses import StreamingResponse

from deltaserve.api.errors import error_body
from deltaserve.errors import DeltaServeError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


def frame(message: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Messages as events; an error that they raise becomes the last one. `close` runs however the stream ends, even if
    the client is gone before its first byte."""

    def __init__(self, messages: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(_body(messages), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _body(messages: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for message in messages:
            yield frame(message)
    except DeltaServeError as error:
        yield frame(error_body(error))
    except Exception:
        logger.exception("a stream failed")
        yield frame(error_body(DeltaServeError("the server failed in the middle of this answer")))
    else:
        yield DONE
