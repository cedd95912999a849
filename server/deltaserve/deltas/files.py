"""Files by key, whole and synced or not there at all. A key ends in the SHA-256 of the bytes: what is written once is
never another.

    objects/ab/abcd….safetensors     a version of a model (`deltas.store`)
    parts/UPLOAD/SHA256              a part of an upload (`deltas.parts`)
    files/FILE/SHA256                a file that waits for a job (`deltas.staging`)
    incoming/                        on this server alone: what is on its way in; emptied at start
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from deltaserve.deltas.tensorfile import sync_directory
from deltaserve.tenants.registry import disk_full_is_an_answer

logger = logging.getLogger(__name__)
FOLDERS = ("objects", "parts", "files")
PIECE_BYTES = 2**20  # handed to the disk at once


def pieces(source: BinaryIO) -> Iterator[bytes]:
    while piece := source.read(PIECE_BYTES):
        yield piece


def object_key(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}.safetensors"


def part_key(upload_id: str, digest: str) -> str:
    return f"parts/{upload_id}/{digest}"


def staged_key(file_id: str, digest: str) -> str:
    return f"files/{file_id}/{digest}"


class Files(Protocol):
    """Thread-safe."""

    @property
    def incoming(self) -> Path: ...

    def put(self, key: str, source: Path) -> None:
        """A synced file of `incoming` moves in. What lies there already is replaced: it may have been damaged. Raises
        StorageFull."""

    def reading(self, key: str) -> AbstractContextManager[Path]:
        """A file on this disk with the bytes, while it is read. Raises FileNotFoundError."""

    def remove(self, key: str) -> None:
        """Harmless where there is none, and where nothing can be removed."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Those under a folder."""

    def close(self) -> None: ...

    def size(self, key: str) -> int:
        """Bytes. Raises FileNotFoundError."""


class LocalFiles:
    """In folders under `root`, which belongs to this process alone. `clears`: what was on its way in goes; without, it
    changes nothing until it is told to."""

    def __init__(self, root: Path, *, clears: bool = True) -> None:
        self._root = root
        self._moving = threading.Lock()  # an empty folder goes, or something comes into it
        self.incoming = root / "incoming"
        if not clears:
            return
        shutil.rmtree(self.incoming, ignore_errors=True)
        for folder in (*FOLDERS, "incoming"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for left in (root / folder).iterdir():
                with contextlib.suppress(OSError):  # there is something in it
                    left.rmdir()

    def path(self, key: str) -> Path:
        return self._root / key

    def put(self, key: str, source: Path) -> None:
        path = self.path(key)
        with self._moving, disk_full_is_an_answer():
            path.parent.mkdir(exist_ok=True)
            sync_directory(path.parent.parent)
            os.replace(source, path)
            sync_directory(path.parent)

    @contextmanager
    def reading(self, key: str) -> Iterator[Path]:
        yield self.path(key)

    def remove(self, key: str) -> None:
        path = self.path(key)
        with self._moving:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # no row names it any more: a start or the doctor removes it
                logger.warning("%s stays where it is: %s", path, error.strerror)
            with contextlib.suppress(OSError):  # others are in it
                path.parent.rmdir()

    def keys(self, prefix: str) -> Iterator[str]:
        for path in sorted((self._root / prefix).glob("*/*")):
            yield path.relative_to(self._root).as_posix()

    def close(self) -> None:
        """Nothing is open."""

    def size(self, key: str) -> int:
        return self.path(key).stat().st_size
