"""Uploaded deltas on disk: immutable objects named by their digest, and a registry that names point into.

    ROOT/objects/ab/abcd….safetensors     content-addressed, written once
    ROOT/incoming/                        uploads under way; emptied at start
    ROOT/lock                             held by the one process that works on the store
    ROOT/registry.sqlite                  (name, version) → digest; the highest version of a name is served

An upload is acknowledged after its bytes and its registry row are synced to disk. A crash at any point leaves the old
state or the new one: what lies in incoming, or in objects without a row, is removed at the next start. An object goes
when no name points to it and no request leases it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.deltas.tensorfile import sync_directory
from deltaserve.errors import ArtifactTooLarge, DigestMismatch, InvalidName, ModelNotFound, StorageFull, StoreInUse
from deltaserve.ids import DeltaDigest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SCHEMA = """
CREATE TABLE IF NOT EXISTS deltas (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, created INTEGER NOT NULL, summary TEXT NOT NULL,
    PRIMARY KEY (name, version)
) STRICT
"""


@dataclass(frozen=True)
class Record:
    """One version of a name. `summary`: what the listing shows (codec, sizes, base)."""

    name: str
    version: int
    digest: DeltaDigest
    created: int
    summary: dict[str, Any]


@contextmanager
def _disk_full_is_an_answer() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull("the store has no room for this upload; nothing of it was kept") from None
        raise
    except sqlite3.OperationalError as error:
        raise StorageFull(f"the registry cannot be written: {error}") from None


class Upload:
    """Bytes on their way in. Closed without `finish`, it leaves nothing."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        with _disk_full_is_an_answer():
            descriptor, path = tempfile.mkstemp(dir=directory)
        self.path = Path(path)
        self._file = os.fdopen(descriptor, "wb")

    def write(self, data: bytes) -> None:
        """Raises ArtifactTooLarge, StorageFull."""
        self.num_bytes += len(data)
        if self.num_bytes > self._max_bytes:
            raise ArtifactTooLarge(f"the upload is over {self._max_bytes} bytes, the most that is accepted")
        self._digest.update(data)
        with _disk_full_is_an_answer():
            self._file.write(data)

    def finish(self, expected_sha256: str | None) -> DeltaDigest:
        """Syncs the bytes to disk. Raises DigestMismatch, StorageFull."""
        digest = self._digest.hexdigest()
        if expected_sha256 is not None and expected_sha256.lower() != digest:
            raise DigestMismatch(
                f"sha256 of the {self.num_bytes} bytes received is {digest}, not {expected_sha256}", param="sha256"
            )
        with _disk_full_is_an_answer():
            self._file.flush()
            os.fsync(self._file.fileno())
        return DeltaDigest(digest)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()  # a full disk may refuse the rest of the buffer
        self.path.unlink(missing_ok=True)


class DeltaStore:
    """Thread-safe."""

    def __init__(self, root: Path, *, on_removed: Callable[[DeltaDigest], None] = lambda digest: None) -> None:
        self._on_removed = on_removed
        root.mkdir(parents=True, exist_ok=True)
        self._guard = (root / "lock").open("w")
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process ends
        except BlockingIOError:
            self._guard.close()
            raise StoreInUse(f"{root}: another server works on this store; each needs one of its own") from None
        self._objects, self._incoming = root / "objects", root / "incoming"
        shutil.rmtree(self._incoming, ignore_errors=True)
        for directory in (self._objects, self._incoming):
            directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._leases: Counter[DeltaDigest] = Counter()
        self._registry = sqlite3.connect(root / "registry.sqlite", check_same_thread=False, isolation_level=None)
        self._registry.execute("PRAGMA journal_mode = WAL")
        self._registry.execute("PRAGMA synchronous = FULL")
        self._registry.execute(SCHEMA)
        for path in self._objects.glob("*/*.safetensors"):
            self._remove_if_unused(DeltaDigest(path.stem))

    def begin_upload(self, max_bytes: int) -> Upload:
        return Upload(self._incoming, max_bytes)

    def commit(self, name: str, upload: Upload, digest: DeltaDigest, summary: dict[str, Any]) -> tuple[Record, bool]:
        """A finished upload becomes the newest version of `name`; (record, is the name new). The same bytes as the
        newest version change nothing. Raises InvalidName, StorageFull."""
        check_name(name)
        with self._lock, _disk_full_is_an_answer():
            newest = self._newest(name)
            path = self.path(digest)
            if newest is not None and newest.digest == digest:
                os.replace(upload.path, path)  # these bytes were just checked; the stored ones may have been damaged
                sync_directory(path.parent)
                return newest, False
            record = Record(name, newest.version + 1 if newest else 1, digest, int(time.time()), summary)
            try:
                path.parent.mkdir(exist_ok=True)
                sync_directory(self._objects)
                os.replace(upload.path, path)
                sync_directory(path.parent)
                with self._registry:  # the new version comes and the old one goes, or neither
                    self._registry.execute("BEGIN")
                    replaced = self._forget(name)
                    self._registry.execute(
                        "INSERT INTO deltas VALUES (?, ?, ?, ?, ?)",
                        (name, record.version, digest, record.created, json.dumps(summary)),
                    )
            except (OSError, sqlite3.OperationalError):
                self._remove_if_unused(digest)
                raise
            for old in replaced:
                self._remove_if_unused(old)
            return record, newest is None

    def get(self, name: str) -> Record:
        """The newest version. Raises ModelNotFound."""
        with self._lock:
            record = self._newest(name)
        if record is None:
            raise ModelNotFound(f"The model `{name}` does not exist.", param="model")
        return record

    def lease(self, name: str) -> Record:
        """`get`, and the object stays on disk until `release`."""
        with self._lock:
            record = self.get(name)
            self._leases[record.digest] += 1
            return record

    def release(self, digest: DeltaDigest) -> None:
        with self._lock:
            self._leases[digest] -= 1
            if self._leases[digest] <= 0:
                del self._leases[digest]
                self._remove_if_unused(digest)

    def records(self) -> list[Record]:
        """The newest version of every name, by name."""
        with self._lock:
            rows = self._registry.execute(
                "SELECT name, MAX(version), digest, created, summary FROM deltas GROUP BY name ORDER BY name"
            ).fetchall()
        return [_record(row) for row in rows]

    def delete(self, name: str) -> None:
        """Forgets every version of `name`. Raises ModelNotFound, StorageFull."""
        with self._lock, _disk_full_is_an_answer():
            self.get(name)
            for digest in self._forget(name):
                self._remove_if_unused(digest)

    def path(self, digest: DeltaDigest) -> Path:
        return self._objects / digest[:2] / f"{digest}.safetensors"

    def close(self) -> None:
        self._registry.close()
        self._guard.close()

    def _newest(self, name: str) -> Record | None:
        row = self._registry.execute(
            "SELECT name, version, digest, created, summary FROM deltas WHERE name = ? ORDER BY version DESC LIMIT 1",
            (name,),
        ).fetchone()
        return _record(row) if row else None

    def _forget(self, name: str) -> list[DeltaDigest]:
        """Removes the rows of `name`; → what they pointed to."""
        rows = self._registry.execute("SELECT digest FROM deltas WHERE name = ?", (name,)).fetchall()
        self._registry.execute("DELETE FROM deltas WHERE name = ?", (name,))
        return [DeltaDigest(digest) for (digest,) in rows]

    def _remove_if_unused(self, digest: DeltaDigest) -> None:
        named = self._registry.execute("SELECT 1 FROM deltas WHERE digest = ? LIMIT 1", (digest,)).fetchone()
        if not named and not self._leases[digest]:
            self.path(digest).unlink(missing_ok=True)
            self._on_removed(digest)


def check_name(name: str) -> None:
    """Raises InvalidName."""
    if not NAME.fullmatch(name):
        raise InvalidName(
            f"{name[:200]!r} is no name: 1 to 128 of A–Z a–z 0–9 . _ - starting with a letter or digit", param="name"
        )


def _record(row: tuple[str, int, str, int, str]) -> Record:
    name, version, digest, created, summary = row
    return Record(name, version, DeltaDigest(digest), created, json.loads(summary))
