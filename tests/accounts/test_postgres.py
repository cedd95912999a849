"""Several servers on one PostgreSQL: they take turns, hear of each other, and outlive the database's restart."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.errors import (
    AuthenticationFailed,
    BadRequest,
    IncompatibleStore,
    NotFound,
    PreconditionFailed,
    RegistryUnavailable,
)
from deltaserve.tenants import migrations
from deltaserve.tenants.accounts import Accounts, Caller, Scope
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.models import Change, Condition, Models
from deltaserve.tenants.postgres import MAX_CONNECTIONS, PostgresRegistry
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BOOTSTRAP = "first"


class Server:
    """What one server has of a registry."""

    def __init__(self, url: str) -> None:
        self.registry = PostgresRegistry(url)
        self.accounts = Accounts(self.registry)
        self.keys = Keys(self.registry, self.accounts, BOOTSTRAP)
        self.models = Models(self.registry)

    def caller(self, key: str) -> Caller:
        """As the middleware asks."""
        self.keys.refresh()
        return self.keys.authenticate(key)


@pytest.fixture
def servers(postgres_url: str) -> Iterator[tuple[Server, Server]]:
    made = Server(postgres_url), Server(postgres_url)
    yield made
    for server in made:
        server.registry.close()


def test_the_schema_is_that_of_sqlite(postgres_url: str, tmp_path: Path) -> None:
    ours, theirs = SqliteRegistry(tmp_path), PostgresRegistry(postgres_url)
    expected = {
        name: sorted(row[1] for row in ours.rows(f"PRAGMA table_info({name})"))
        for (name,) in ours.rows("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    }
    found: dict[str, list[str]] = {}
    columns = (
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema() "
        "AND table_name != 'schema_steps'"
    )
    for table, column in theirs.rows(columns):
        found.setdefault(table, []).append(column)
    assert {table: sorted(names) for table, names in found.items()} == expected
    assert theirs.rows("SELECT id, name FROM tenants") == ours.rows("SELECT id, name FROM tenants")
    for registry in (ours, theirs):
        registry.close()


def test_servers_that_start_at_once_migrate_once_and_a_newer_schema_is_refused(postgres_url: str, at_once: Any) -> None:
    made = at_once([lambda: PostgresRegistry(postgres_url)] * 4)
    steps = made[0].rows("SELECT taken FROM schema_steps ORDER BY taken")
    assert [taken for (taken,) in steps] == list(range(1, len(migrations.STEPS) + 1))
    with made[1].write() as db:
        db.execute("INSERT INTO schema_steps VALUES (99)")
    for registry in made:
        registry.close()
    with pytest.raises(IncompatibleStore, match="schema 99"):
        PostgresRegistry(postgres_url)


def test_a_revoked_key_and_a_deleted_tenant_end_on_the_other_server_with_the_next_request(
    servers: tuple[Server, Server],
) -> None:
    a, b = servers
    acme = a.accounts.create("acme", "test")
    key, text = a.keys.create(acme, [Scope.MANAGE], "test")
    other, other_text = a.keys.create(acme, [Scope.MANAGE], "test")
    assert b.caller(text).tenant.name == "acme" and b.caller(other_text).key_id == other.id
    a.accounts.limit(acme, {"max_models": 7}, "test")
    assert b.caller(text).tenant.limits.max_models == 7
    b.accounts.limit(b.accounts.named("acme"), {"max_tokens": 9}, "test")
    limits = a.caller(text).tenant.limits
    assert (limits.max_models, limits.max_tokens) == (7, 9), "neither has undone what the other did"
    a.keys.revoke(key, "test")
    with pytest.raises(AuthenticationFailed):
        b.caller(text)
    assert b.caller(other_text).key_id == other.id
    b.accounts.delete(b.accounts.named("acme"), "test")
    for gone in (
        lambda: a.accounts.limit(acme, {"max_models": 1}, "test"),
        lambda: a.keys.create(acme, [Scope.MANAGE], "test"),
    ):
        with pytest.raises(NotFound):
            gone()
    with pytest.raises(AuthenticationFailed):
        a.caller(other_text)


def test_a_server_that_was_open_is_closed_by_the_first_key_of_another(postgres_url: str) -> None:
    registry, other = PostgresRegistry(postgres_url), Server(postgres_url)
    keys = Keys(registry, Accounts(registry), None)
    assert keys.authenticate(None).is_admin
    _, text = other.keys.create(other.accounts.default, [Scope.ADMIN], "test")
    keys.refresh()
    with pytest.raises(AuthenticationFailed):
        keys.authenticate(None)
    assert keys.authenticate(text).is_admin
    registry.close()
    other.registry.close()


def test_of_changes_at_once_one_finds_its_condition_and_no_number_is_given_twice(
    servers: tuple[Server, Server], at_once: Any
) -> None:
    tenant = servers[0].accounts.default.id
    numbers = at_once(
        [
            lambda server=server, i=i: server.models.add(tenant, "m", f"{i:064}", 1, {}).number
            for server in servers
            for i in range(10 * servers.index(server), 10 * servers.index(server) + 10)
        ]
    )
    assert sorted(numbers) == list(range(1, 21))
    model = servers[0].models.of(tenant)[0]
    seen = Condition(model.etag)

    def move(server: Server, version: int) -> bool:
        with server.registry.write():
            now = server.models.again(model)
            try:
                seen.check(now)
            except PreconditionFailed:
                return False
            server.models.change(now, Change(version=version))
            return True

    moved = at_once([lambda server=server, n=n: move(server, n) for n, server in enumerate(servers * 3, 2)])
    assert sorted(moved) == [False] * 5 + [True]


def test_a_read_does_not_wait_for_another_servers_transaction_and_does_not_see_it(
    servers: tuple[Server, Server],
) -> None:
    a, b = servers
    with a.registry.write():
        a.registry.audit("me", "a", "x")
        assert len(a.registry.audit_log()) == 1 and b.registry.audit_log() == []
        found: list[Any] = []
        reader = threading.Thread(target=lambda: found.append(a.registry.audit_log()))
        reader.start()
        reader.join(30)
        assert found == [[]], "nor do other threads of the same server"
    assert len(b.registry.audit_log()) == 1


def test_more_threads_than_connections_wait_for_one(servers: tuple[Server, Server], at_once: Any) -> None:
    registry = servers[0].registry
    assert at_once([lambda: registry.rows("SELECT 1 FROM pg_sleep(0.01)")] * (3 * MAX_CONNECTIONS)) == [[(1,)]] * 24
    assert len(registry._idle) <= MAX_CONNECTIONS


def test_a_lost_connection_is_opened_again_and_what_was_not_committed_is_not_there(
    servers: tuple[Server, Server],
) -> None:
    a, b = servers
    b.registry.audit("me", "kept", "x")

    def cut() -> None:
        others = "FROM pg_stat_activity WHERE application_name = 'deltaserve' AND pid != pg_backend_pid()"
        b.registry.rows(f"SELECT pg_terminate_backend(pid) {others}")

    cut()
    assert [entry.action for entry in a.registry.audit_log()] == ["kept"]
    cut()
    a.registry.audit("me", "after", "x")
    with pytest.raises(RegistryUnavailable), a.registry.write():
        a.registry.audit("me", "lost", "x")
        cut()
        a.registry.audit("me", "lost", "x")
    b.registry.audit("me", "turn", "x")
    assert [entry.action for entry in a.registry.audit_log()] == ["turn", "after", "kept"]


def test_a_database_that_is_away_is_an_answer_and_its_return_is_noticed(postgres: Any) -> None:
    server = Server(postgres.url(f"test_{os.urandom(6).hex()}"))
    server.registry.audit("me", "before", "x")
    postgres.stop()
    try:
        for call in (server.keys.refresh, server.registry.audit_log, lambda: server.registry.audit("me", "x", "x")):
            with pytest.raises(RegistryUnavailable) as caught:
                call()
            assert caught.value.retry_after_s and "127.0.0.1" not in caught.value.message
        with pytest.raises(RegistryUnavailable, match=r"refused"):
            PostgresRegistry(f"postgresql://me:sec%40ret@127.0.0.1:{postgres.port}/x")
    finally:
        postgres.start()
    server.registry.audit("me", "after", "x")
    assert [entry.action for entry in server.registry.audit_log()] == ["after", "before"]
    server.registry.close()


@pytest.mark.parametrize(
    "url", ["postgresql://me:sec@ret@127.0.0.1/x", "postgresql://me:sec/ret@127.0.0.1/x", "postgresql://x?secret=ret"]
)
def test_a_url_that_cannot_be_read_is_refused_without_being_told(url: str) -> None:
    with pytest.raises((BadRequest, RegistryUnavailable)) as caught:
        PostgresRegistry(url)
    assert "ret" not in caught.value.message and "sec" not in caught.value.message
