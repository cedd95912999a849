"""The registry: who there is and what they own. Rows in SQLite (`tenants.sqlite`) or PostgreSQL (`tenants.postgres`).

SQL is written once, for both: parameters are `?`, flags are 0 and 1, times are unix seconds, ON CONFLICT instead of
OR IGNORE, a name for each subquery. Both have one writer at a time, so what a transaction reads, it may act on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import secrets
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

from deltaserve.errors import RegistryUnavailable, StorageFull, StoreInUse, StoreUnavailable

Row = tuple[Any, ...]


@contextmanager
def disk_full_is_an_answer() -> Iterator[None]:
    """Turns a disk without room into StorageFull, one that cannot be written into Store- or RegistryUnavailable."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull("the store has no room for this; nothing of it was kept") from None
        if error.errno in (errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM):
            raise StoreUnavailable(f"the store cannot be written: {error.strerror}") from None
        raise
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise RegistryUnavailable(f"the registry cannot be written: {error}") from None
        if code == sqlite3.SQLITE_ERROR:  # a statement's fault, not the disk's
            raise
        raise StorageFull(f"the registry cannot be written: {error}") from None


def alone_in(root: Path, refusal: str) -> TextIO:
    """Holds the folder's lock until it is closed, or the process ends: then the kernel lets go. Raises StoreInUse."""
    guard = (root / "lock").open("w")
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        guard.close()
        raise StoreInUse(refusal) from None
    return guard


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


class Cursor(Protocol):
    """What a statement found."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Transaction(Protocol):
    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor: ...


class Registry(ABC):
    """Thread-safe."""

    is_shared: ClassVar[bool]  # do other servers change it too?

    @abstractmethod
    def rows(self, sql: str, *values: Any) -> list[Row]:
        """What a SELECT finds; within `write`, with what was written there."""

    @abstractmethod
    def write(self) -> AbstractContextManager[Transaction]:
        """A transaction, on disk when the outermost `with` ends; an exception takes it all back. Nobody else writes
        meanwhile. Raises StorageFull, RegistryUnavailable: then it may or may not be on disk."""

    def integrity(self) -> list[str]:
        """What the database finds wrong with itself."""
        return []

    @abstractmethod
    def close(self) -> None: ...

    def identity(self) -> str:
        """Of this registry and no other, from the first time it is asked."""
        with self.write() as db:
            if not self.rows("SELECT id FROM identity"):
                db.execute("INSERT INTO identity VALUES (?)", (secrets.token_hex(16),))
            ((identity,),) = self.rows("SELECT id FROM identity")
            return str(identity)

    def last_change(self) -> int:
        """Grows with every change to accounts, keys and models, by whatever server: each is in the audit log."""
        ((number,),) = self.rows("SELECT COALESCE(MAX(id), 0) FROM audit")
        return int(number)

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
