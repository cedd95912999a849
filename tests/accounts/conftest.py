"""A registry in a folder of its own, its accounts, and a clock that stands still."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltaserve.tenants.accounts import Accounts
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deltaserve.tenants.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = SqliteRegistry(tmp_path)
    yield opened
    opened.close()


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
