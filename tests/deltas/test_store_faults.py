"""What was acknowledged stays, what was not leaves nothing, on a full disk and after a kill at any point."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas import files as files_module
from deltaserve.deltas import store as store_module
from deltaserve.errors import (
    StorageFull,
)

from .storehouse import Store, digest_of, incoming, objects

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class BrokenRegistry:
    """A connection that cannot write."""

    def __init__(self, connection: sqlite3.Connection, *verbs: str) -> None:
        self._connection = connection
        self._verbs = verbs

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql.startswith(self._verbs):
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(sql, *arguments)


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["mkstemp", "fsync", "replace", "mkdir", "sync_directory", "registry"])
def test_a_disk_that_is_full_anywhere_is_an_answer_and_nothing_is_kept(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    old, _ = local.put("a", b"old")
    with monkeypatch.context() as patch:
        match place:
            case "mkstemp":
                patch.setattr(store_module.tempfile, "mkstemp", full)
            case "fsync":
                patch.setattr(os, "fsync", full)
            case "replace":
                patch.setattr(os, "replace", full)
            case "mkdir":
                patch.setattr(type(tmp_path), "mkdir", full)
            case "sync_directory":
                patch.setattr(files_module, "sync_directory", full)
            case "registry":
                patch.setattr(local.registry, "_connection", BrokenRegistry(local.registry._connection, "INSERT"))
        with pytest.raises(StorageFull):
            local.put("a", b"new")
    assert (objects(tmp_path), incoming(tmp_path), local.get("a")) == ({old.digest}, [], old)
    assert local.put("a", b"new")[0].number == 2


@pytest.mark.parametrize("place", ["sync_directory", "registry"])
def test_a_full_disk_does_not_take_bytes_that_another_name_has(
    local: Store, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    record, _ = local.put("a", b"one")
    with monkeypatch.context() as patch:
        if place == "registry":
            patch.setattr(local.registry, "_connection", BrokenRegistry(local.registry._connection, "INSERT"))
        else:
            patch.setattr(files_module, "sync_directory", full)
        with pytest.raises(StorageFull):
            local.put("b", b"one")
    assert local.path(record.digest).read_bytes() == b"one"


@pytest.mark.parametrize("verb", ["DELETE", "INSERT"])
def test_a_registry_that_cannot_be_written_keeps_what_it_says(
    local: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    record, _ = local.put("a", b"one")
    with monkeypatch.context() as patch:
        patch.setattr(local.registry, "_connection", BrokenRegistry(local.registry._connection, verb))
        with pytest.raises(StorageFull):
            local.put("a", b"two")
        if verb == "DELETE":
            with pytest.raises(StorageFull):
                local.remove("a")
    assert (local.all(), objects(tmp_path)) == ([("a", record)], {record.digest})
    assert local.put("a", b"three")[0].number == 2
    assert objects(tmp_path) == {digest_of(b"three")}


SMALL_DISK = """
import resource, sys
from pathlib import Path
from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.tenants.accounts import Accounts
from deltaserve.tenants.sqlite import SqliteRegistry
from deltaserve.errors import StorageFull
root = Path(sys.argv[1])
registry = SqliteRegistry(root)
store, owner = DeltaStore(registry, LocalFiles(root)), Accounts(registry).default
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # EFBIG beyond 64 KiB, without privileges
refused = 0
for i in range(60):
    upload = store.begin_upload(1 << 30)
    try:
        upload.write(bytes([i]) * (1000 if i % 2 else 1 << 17))
        digest = upload.finish(None)
        store.commit(Destination(owner, f"n{i}", "test"), upload, digest, {"filler": "x" * 4000})
        print(f"n{i}", digest)
    except StorageFull:
        refused += 1
    finally:
        upload.close()
assert not list((root / "incoming").iterdir())
print("refused", refused)
"""


def test_a_file_size_limit_of_the_system_is_an_answer_and_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *kept, (_, refused) = [line.split() for line in done.stdout.splitlines()]
    assert int(refused) > 30  # the large ones, and small ones once the registry itself is full
    store = Store(tmp_path)
    assert {(name, record.digest) for name, record in store.all()} == {(name, digest) for name, digest in kept}
    assert store.kept() == {digest for _, digest in kept}
    store.close()


def test_a_kill_at_any_point_keeps_what_was_acknowledged_and_nothing_half(
    support: Callable[[str], Any], tmp_path: Path
) -> None:
    chance, last, kept = random.Random(5), 0, dict[str, int]()
    with support("uploader").Uploader(str(tmp_path), None, tmp_path) as uploader:
        for _ in range(12):
            said = uploader.live(last, chance.uniform(0.0, 0.06))
            last, kept = check_store(tmp_path, max([last, *said.values()]), kept | said)
    assert last > 3


def check_store(root: Path, last: int, kept: dict[str, int]) -> tuple[int, dict[str, int]]:
    """Opens it again: every acknowledged upload or the one after it is there, and no file beside."""
    store = Store(root)
    records = dict(store.all())
    found = {name: record.summary["i"] for name, record in records.items()}
    assert all(found[name] in (i, last + 1) for name, i in kept.items())
    for record in records.values():
        assert digest_of(store.path(record.digest).read_bytes()) == record.digest
    assert objects(root) == {record.digest for record in records.values()}
    assert incoming(root) == []
    store.close()
    return max([last, *found.values()]), found
