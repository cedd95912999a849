"""A delta artifact on disk, on its way to the server: hashed once, then read in chunks and never held in memory."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve_client.errors import InvalidArgument

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Iterator

    Progress = Callable[[int, int], None]

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Artifact:
    path: Path
    size_bytes: int
    sha256: str

    @classmethod
    def measure(cls, path: str | os.PathLike[str]) -> Artifact:
        """Reads the file once. Raises OSError when it cannot be read."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return cls(Path(path), file.tell(), digest.hexdigest())

    def body(self, progress: Progress | None) -> Iterator[bytes]:
        """The bytes that were hashed. `progress(sent, total)` follows each chunk that was handed over."""
        sent = 0
        for chunk in self._chunks():
            yield chunk
            sent += len(chunk)
            if progress is not None:
                progress(sent, self.size_bytes)

    async def async_body(self, progress: Progress | None) -> AsyncIterator[bytes]:
        """As `body`, the disk read in a worker thread and `progress` called in the event loop."""
        sent = 0
        chunks = self._chunks()
        while chunk := await asyncio.to_thread(next, chunks, b""):
            yield chunk
            sent += len(chunk)
            if progress is not None:
                progress(sent, self.size_bytes)

    def _chunks(self) -> Iterator[bytes]:
        left = self.size_bytes
        with open(self.path, "rb") as file:
            while left:
                chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise InvalidArgument(f"{self.path}: became shorter while it was uploaded")
                left -= len(chunk)
                yield chunk
