"""Server-sent events: bytes in, the payload of each `data:` event out.

Knows line ends (LF, CRLF, CR), comments and events of several `data:` lines, and nothing about what the payload means.
The fields `event`, `id` and `retry` are skipped: the server's streams do not use them.
"""

from __future__ import annotations


class SseDecoder:
    """Fed with chunks cut at any byte; payloads stay bytes, so that a character cut in two is never decoded."""

    def __init__(self) -> None:
        self._line = b""  # begun, its end not seen yet
        self._data: list[bytes] = []  # the `data:` lines of the event under way
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads of the events that `chunk` completes. An event not ended by an empty line is never returned."""
        if not chunk:
            return []
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # second half of a CRLF that was cut in two
        self._after_cr = chunk.endswith(b"\r")
        lines = (self._line + chunk).splitlines(keepends=True)
        self._line = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        return [event for line in lines if (event := self._take(line.rstrip(b"\r\n"))) is not None]

    def _take(self, line: bytes) -> bytes | None:
        if not line:
            data, self._data = self._data, []
            return b"\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None
