"""Artifacts that lie on the server already, under one allow-listed root: opened where they truly are, or not at all."""

from __future__ import annotations

import os
import stat
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deltaserve.deltas.files import pieces
from deltaserve.errors import BadRequest, NotFound, PermissionDenied

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Import:
    """A file of the import root, to be read once."""

    num_bytes: int
    pieces: Iterator[bytes]


class Imports(Protocol):
    """Where artifacts are taken from: a directory, or a bucket."""

    def open(self, asked: str) -> AbstractContextManager[Import]: ...


def missing(asked: str) -> NotFound:
    """Outside or not there: which of them, nobody learns."""
    return NotFound(f"there is no file {asked[:200]!r} under the import root", param="lora_path")


class ImportRoot:
    """`root` None: nothing is ever imported. Raises BadRequest for one that is no directory."""

    def __init__(self, root: Path | None) -> None:
        if root is not None and not root.is_dir():
            raise BadRequest(f"--import-root {root}: there is no such directory")
        self._root = None if root is None else Path(os.path.realpath(root))

    @contextmanager
    def open(self, asked: str) -> Iterator[Import]:
        """A regular file under the root: `asked` is relative to it, or absolute. Links are followed as long as they
        stay within. Raises PermissionDenied without a root; NotFound, in the same words for a file outside and for
        none."""
        if self._root is None:
            raise PermissionDenied("this server imports no files; start it with --import-root", param="lora_path")
        try:
            path = os.path.realpath(self._root / asked, strict=True)
            if not self._holds(path):  # nothing outside is even opened
                raise missing(asked)
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):  # ValueError: a NUL, a lone surrogate
            raise missing(asked) from None
        # What was opened, and not what the name meant a moment before: a folder may have become a link.
        is_within = self._holds(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not is_within or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise missing(asked)
        with os.fdopen(descriptor, "rb") as file:
            yield Import(os.fstat(descriptor).st_size, pieces(file))

    def _holds(self, path: str) -> bool:
        return self._root is not None and Path(path).is_relative_to(self._root)
