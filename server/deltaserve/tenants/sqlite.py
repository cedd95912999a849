"""registry.sqlite: a registry in one file, for one server. WAL, synced at every commit."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaserve.errors import IncompatibleStore
from deltaserve.tenants import migrations
from deltaserve.tenants.registry import Registry, Row, Transaction, alone_in, disk_full_is_an_answer


class SqliteRegistry(Registry):
    """Opens, locks and migrates the registry in `root`; one process at a time. Raises StoreInUse,
    IncompatibleStore, and for its disk StorageFull, RegistryUnavailable.

    `is_alone` False: beside the process that works on it. `changes` False: as it is; writing fails.
    """

    is_shared = False

    def __init__(self, root: Path, *, is_alone: bool = True, changes: bool = True) -> None:
        if changes:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = root / "registry.sqlite"
        with contextlib.ExitStack() as opened:
            if is_alone:
                refusal = f"{root}: another server works on this store; each needs one of its own"
                opened.enter_context(alone_in(root, refusal))
            self._lock = threading.RLock()
            self._depth = 0
            try:
                uri = f"{path.resolve().as_uri()}?mode={'rwc' if changes else 'ro'}"
                self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
                opened.callback(self._connection.close)
                with disk_full_is_an_answer():
                    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON") if changes else ():
                        self._connection.execute(f"PRAGMA {pragma}")
                    self._migrate(changes=changes)
            except sqlite3.OperationalError:  # a step's
                raise
            except sqlite3.DatabaseError as error:
                raise IncompatibleStore(f"{path} cannot be used: {error}") from None
            self._opened = opened.pop_all()

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

    def integrity(self) -> list[str]:
        checked = [str(row[0]) for row in self.rows("PRAGMA integrity_check") if row[0] != "ok"]
        loose = self.rows("PRAGMA foreign_key_check")
        return checked + [f"row {row} of {table} belongs to a row of {to} that is gone" for table, row, to, _ in loose]

    def close(self) -> None:
        self._opened.close()

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

    def _migrate(self, *, changes: bool) -> None:
        """`PRAGMA user_version` counts the steps."""
        (taken,) = self._connection.execute("PRAGMA user_version").fetchone()
        if not changes and list(migrations.missing(taken)):
            raise IncompatibleStore(
                f"the registry has schema {taken} of {len(migrations.STEPS)}; a server takes the steps at its start"
            )
        for number, step in migrations.missing(taken):
            with self._transaction():
                for statement in step:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {number}")
