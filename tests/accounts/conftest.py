"""A registry in a folder of its own, its accounts, and a clock that stands still."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltaserve.tenants import postgres
from deltaserve.tenants.accounts import Accounts
from deltaserve.tenants.postgres import PostgresRegistry
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deltaserve.tenants.registry import Registry


@pytest.fixture(params=["sqlite", "postgres"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    if request.param == "sqlite":
        opened: Registry = SqliteRegistry(tmp_path)
    else:
        opened = PostgresRegistry(request.getfixturevalue("postgres_url"))
    yield opened
    opened.close()


@pytest.fixture
def set_writable(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets the registry be written, or not."""

    def change(on: bool) -> None:
        off = "off" if on else "on"
        if isinstance(registry, SqliteRegistry):
            registry.rows(f"PRAGMA query_only = {off}")
        else:
            monkeypatch.setattr(postgres, "SESSION", (f"SET default_transaction_read_only = {off}",))
            registry.close()  # and opened again at once

    return change


@pytest.fixture
def accounts(registry: Registry) -> Accounts:
    return Accounts(registry)


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()
