"""Server-sent events: framing, a mid-stream error as an event, [DONE] at the end of a whole stream only."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from deltaserve.api.errors import error_body
from deltaserve.errors import DeltaServeError

logger = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


def frame(message: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def stream(messages: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """An error that `messages` raises becomes the stream's last event."""

    async def body() -> AsyncIterator[bytes]:
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

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
