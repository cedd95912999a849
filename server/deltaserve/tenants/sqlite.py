"""registry.sqlite: a registry in one file, for one server. WAL, synced at every commit."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaserve.errors import StoreInUse
from deltaserve.tenants import migrations
from deltaserve.tenants.registry import Registry, Row, Transaction, disk_full_is_an_answer


class SqliteRegistry(Registry):
    """Opens, locks and migrates the registry in `root`; one process at a time. Raises StoreInUse,
    IncompatibleStore."""

    is_shared = False

    def __init__(self, root: Path) -> None:
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
            self._migrate()
        except BaseException:
            self.close()
            raise

    def rows(self, sql: str, *values: Any) -> list[Row]:
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        with self._lock, disk_full_is_an_answer():
            if self._depth:
                yield self._connection
                return
            with self._transaction():
                self._depth = 1
                try:
                    yield self._connection
                finally:
                    self._depth = 0

    def close(self) -> None:
        self._connection.close()
        self._guard.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk may have rolled back already
                self._connection.execute("ROLLBACK")
            raise

    def _migrate(self) -> None:
        """`PRAGMA user_version` counts the steps."""
        (taken,) = self._connection.execute("PRAGMA user_version").fetchone()
        for number, step in migrations.missing(taken):
            with self._transaction():
                for statement in step:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {number}")
