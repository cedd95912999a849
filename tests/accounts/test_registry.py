"""The registry's file: schemas of before are carried over, a transaction is whole or nothing."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING

import pytest

from deltaserve.errors import IncompatibleStore, RegistryUnavailable, StorageFull
from deltaserve.tenants import migrations
from deltaserve.tenants.accounts import Accounts, Caller
from deltaserve.tenants.models import Models
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deltaserve.tenants.registry import Registry

BEFORE_TENANTS = """CREATE TABLE deltas (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, created INTEGER NOT NULL, summary TEXT NOT NULL,
    PRIMARY KEY (name, version)
) STRICT"""


def write_as_before(root: Path, *rows: tuple[str, int, str, int, dict[str, int]]) -> None:
    with sqlite3.connect(root / "registry.sqlite") as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(BEFORE_TENANTS)
        for row in rows:
            connection.execute("INSERT INTO deltas VALUES (?, ?, ?, ?, ?)", (*row[:4], json.dumps(row[4])))
    connection.close()


def test_a_store_from_before_there_were_tenants_belongs_to_the_default_one(tmp_path: Path) -> None:
    write_as_before(tmp_path, ("a", 3, "d3", 70, {"disk_bytes": 9}), ("b", 1, "d1", 50, {}), ("b", 2, "d2", 60, {}))
    registry = SqliteRegistry(tmp_path)
    models, me = Models(registry), Caller(Accounts(registry).default, "-", frozenset())
    a, b = models.visible(me)
    assert (a.owner, a.name, a.active.number, a.active.digest, a.active.summary) == (
        "default",
        "a",
        3,
        "d3",
        {"disk_bytes": 9},
    )
    assert [(version.number, version.digest, version.created) for version in models.versions(b)] == [
        (2, "d2", 60),
        (1, "d1", 50),
    ]
    assert models.add(me.tenant.id, "a", "d4", 5, {}).number == 4, "numbers go on"
    registry.close()


def test_every_schema_on_the_way_becomes_the_present_one(tmp_path: Path) -> None:
    def schema(root: Path) -> list[tuple[str, str]]:
        registry = SqliteRegistry(root)
        try:
            return sorted((name, sql) for name, sql in registry.rows("SELECT name, sql FROM sqlite_schema") if sql)
        finally:
            registry.close()

    (tmp_path / "new").mkdir()
    expected = schema(tmp_path / "new")
    for taken in range(len(migrations.STEPS) + 1):
        root = tmp_path / str(taken)
        root.mkdir()
        with sqlite3.connect(root / "registry.sqlite", isolation_level=None) as connection:
            for step in migrations.STEPS[:taken]:
                for statement in step:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {taken}")
        connection.close()
        assert schema(root) == expected


def test_a_step_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as_before(tmp_path, ("a", 1, "d1", 50, {}))
    broken = (*migrations.TENANTS, "SELECT * FROM nowhere")
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", (migrations.FIRST, broken))
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            SqliteRegistry(tmp_path)
    registry = SqliteRegistry(tmp_path)
    assert [model.name for model in Models(registry).of(migrations.DEFAULT_TENANT)] == ["a"]
    registry.close()


def test_a_file_of_a_newer_deltaserve_is_refused(tmp_path: Path) -> None:
    SqliteRegistry(tmp_path).close()
    with sqlite3.connect(tmp_path / "registry.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(IncompatibleStore, match="schema 99"):
        SqliteRegistry(tmp_path)


def test_a_transaction_in_a_transaction_goes_or_stays_with_it(registry: Registry) -> None:
    with pytest.raises(RuntimeError), registry.write():
        registry.audit("me", "a", "x")
        with registry.write():
            registry.audit("me", "b", "x")
        raise RuntimeError
    assert registry.audit_log() == []
    with registry.write():
        registry.audit("me", "a", "x")
        registry.audit("me", "b", "x", "d1", n=1)
    newest, oldest = registry.audit_log()
    assert (newest.action, newest.digest, newest.detail, oldest.action) == ("b", "d1", {"n": 1}, "a")
    assert registry.audit_log(before=newest.id) == [oldest] and registry.audit_log(limit=1) == [newest]


def test_a_registry_that_cannot_be_written_says_so(registry: Registry, set_writable: Callable[[bool], None]) -> None:
    set_writable(False)
    with pytest.raises((StorageFull, RegistryUnavailable), match="registry"):
        registry.audit("me", "a", "x")
