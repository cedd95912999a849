"""registry.sqlite: the one file that says who there is and what they own. WAL, synced at every commit."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.errors import StorageFull, StoreInUse
from deltaserve.tenants.migrations import migrate

Row = tuple[Any, ...]


@contextmanager
def disk_full_is_an_answer() -> Iterator[None]:
    """Turns a disk without room into StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull("the store has no room for this; nothing of it was kept") from None
        raise
    except sqlite3.OperationalError as error:
        raise StorageFull(f"the registry cannot be written: {error}") from None


@dataclass(frozen=True)
class AuditEntry:
    """One change: who (tenant/key) did what to which object, when (unix seconds)."""

    id: int
    at: int
    who: str
    action: str
    object: str
    digest: str | None
    detail: dict[str, Any]


class Registry:
    """Opens, locks and migrates the registry in `root`. Thread-safe; one process at a time. Raises StoreInUse,
    IncompatibleStore."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._guard = (root / "lock").open("w")
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process ends
        except BlockingIOError:
            self._guard.close()
            raise StoreInUse(f"{root}: another server works on this store; each needs one of its own") from None
        self._lock = threading.RLock()
        self._depth = 0
        self._connection = sqlite3.connect(root / "registry.sqlite", check_same_thread=False, isolation_level=None)
        try:
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            migrate(self._connection)
        except BaseException:
            self.close()
            raise

    def rows(self, sql: str, *values: Any) -> list[Row]:
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction, on disk when the outermost `with` ends; an exception takes it all back. Raises StorageFull."""
        with self._lock, disk_full_is_an_answer():
            if self._depth:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.OperationalError):  # a full disk may have rolled back already
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth = 0

    def audit(self, who: str, action: str, target: str, digest: str | None = None, /, **detail: Any) -> None:
        """Notes a change, in the transaction that makes it."""
        with self.write() as db:
            db.execute(
                "INSERT INTO audit (at, who, action, object, digest, detail) VALUES (?, ?, ?, ?, ?, ?)",
                (int(time.time()), who, action, target, digest, json.dumps(detail)),
            )

    def audit_log(self, *, before: int | None = None, limit: int = 100) -> list[AuditEntry]:
        """The newest entries first, those older than entry `before`."""
        rows = self.rows(
            "SELECT id, at, who, action, object, digest, detail FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?",
            2**62 if before is None else before,
            limit,
        )
        return [
            AuditEntry(number, at, who, action, target, digest, json.loads(detail))
            for number, at, who, action, target, digest, detail in rows
        ]

    def close(self) -> None:
        self._connection.close()
        self._guard.close()
