"""What was acknowledged stays, what was not leaves nothing, on a full disk and after a kill at any point."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas import files as files_module
from deltaserve.deltas import store as store_module
from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.s3 import S3Files
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.errors import (
    ArtifactTooLarge,
    DigestMismatch,
    InvalidName,
    ModelNotFound,
    PreconditionFailed,
    StorageFull,
    StoreInUse,
)
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.accounts import Caller, Tenant
from deltaserve.tenants.models import ALWAYS, Change, Condition, Version
from deltaserve.tenants.postgres import PostgresRegistry
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deltaserve.tenants.registry import Registry


ME = Caller(Tenant(1, "default", 0), "-", frozenset())


class Store(DeltaStore):
    """A store with the registry it works on, and short ways to ask it as its first tenant."""

    def __init__(self, root: Path, shared: tuple[str, str] | None = None, **options: Any) -> None:
        """`shared`: URLs of a registry and a bucket that other servers have too."""
        if shared is None:
            self.registry: Registry = SqliteRegistry(root)
            files: Any = LocalFiles(root)
        else:
            self.registry = PostgresRegistry(shared[0])
            files = S3Files(shared[1], root, 1 << 20, self.registry.identity())
        super().__init__(self.registry, files, **options)

    def kept(self) -> set[str]:
        """The objects that are left when all has gone that may."""
        if self.registry.is_shared:
            with self.registry.write() as db:
                db.execute("UPDATE removals SET due = 0")
            self.sweep()
        return {key.rpartition("/")[2].removesuffix(".safetensors") for key in self.files.keys("objects")}

    def put(self, name: str, data: bytes, condition: Condition = ALWAYS, **summary: Any) -> tuple[Version, bool]:
        upload = self.begin_upload(1 << 20)
        try:
            upload.write(data)
            stored = self.commit(
                Destination(ME.tenant, name, "test", True, condition), upload, upload.finish(None), summary
            )
            return stored.version, stored.is_new_name
        finally:
            upload.close()

    def get(self, name: str) -> Version:
        return self.models.find(ME, name)[0].active

    def all(self) -> list[tuple[str, Version]]:
        return [(model.name, model.active) for model in self.models.visible(ME)]

    def path(self, digest: DeltaDigest) -> Path:
        with self.reading(digest) as path:
            return path

    def remove(self, name: str) -> None:
        self.delete(ME, name)

    def close(self) -> None:
        self.registry.close()
        if isinstance(self.files, S3Files):
            self.files.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture(params=["local", "shared"])
def shared(request: pytest.FixtureRequest) -> tuple[str, str] | None:
    if request.param == "local":
        return None
    return request.getfixturevalue("postgres_url"), request.getfixturevalue("s3_url")


@pytest.fixture
def store(tmp_path: Path, shared: tuple[str, str] | None) -> Iterator[Store]:
    opened = Store(tmp_path, shared)
    yield opened
    opened.close()


def objects(root: Path) -> set[str]:
    return {path.stem for path in (root / "objects").glob("*/*")}


def incoming(root: Path) -> list[Path]:
    return list((root / "incoming").iterdir())


def digest_of(data: bytes) -> DeltaDigest:
    return DeltaDigest(hashlib.sha256(data).hexdigest())


def test_an_acknowledged_upload_survives_a_restart(tmp_path: Path, shared: tuple[str, str] | None) -> None:
    before = Store(tmp_path, shared)
    record, new = before.put("a", b"one", codec="x")
    assert (record.number, new, record.digest) == (1, True, digest_of(b"one"))
    before.close()
    after = Store(tmp_path, shared)
    assert after.get("a") == record
    assert after.get("a").summary == {"codec": "x"}
    assert after.path(record.digest).read_bytes() == b"one"
    after.close()


def test_a_new_version_takes_the_place_of_the_old_one(store: Store) -> None:
    store.put("a", b"one")
    record, new = store.put("a", b"two")
    assert (record.number, new) == (2, False)
    assert store.get("a") == record
    assert store.kept() == {digest_of(b"two")}
    assert store.all() == [("a", record)]


def test_the_same_bytes_again_change_nothing(local: Store, tmp_path: Path) -> None:
    first, _ = local.put("a", b"one")
    assert local.put("a", b"one") == (first, False)
    assert incoming(tmp_path) == []


def test_the_same_bytes_again_heal_a_damaged_object(store: Store) -> None:
    store.put("a", b"one")
    store.path(digest_of(b"one")).write_bytes(b"0ne")
    store.put("a", b"one")
    assert store.path(digest_of(b"one")).read_bytes() == b"one"


def test_two_servers_cannot_share_a_store(local: Store, tmp_path: Path) -> None:
    local.put("a", b"one")
    with pytest.raises(StoreInUse, match="another server works on this store"):
        Store(tmp_path)
    assert local.path(digest_of(b"one")).read_bytes() == b"one"


def test_two_names_share_the_same_bytes_until_both_are_gone(store: Store) -> None:
    store.put("a", b"one")
    record, new = store.put("b", b"one")
    assert (record.number, new) == (1, True)
    store.remove("a")
    assert store.path(digest_of(b"one")).read_bytes() == b"one"
    store.remove("b")
    assert store.kept() == set()


def test_a_lease_keeps_a_replaced_or_deleted_object_until_its_last_release(store: Store) -> None:
    store.put("a", b"one")
    leases = [store.lease(ME, "a")[1], store.lease(ME, "a")[1]]
    store.put("a", b"two")
    store.remove("a")
    assert store.kept() == {digest_of(b"one")} and store.path(digest_of(b"one")).read_bytes() == b"one"
    store.release(leases[0].digest)
    assert store.kept() == {digest_of(b"one")}
    store.release(leases[1].digest)
    assert store.kept() == set()


def test_releasing_what_is_still_named_keeps_it(store: Store) -> None:
    store.put("a", b"one")
    store.release(store.lease(ME, "a")[1].digest)
    assert store.kept() == {digest_of(b"one")}


def test_deleting_tells_what_was_removed_and_a_name_begins_anew(tmp_path: Path) -> None:
    removed: list[DeltaDigest] = []
    store = Store(tmp_path, on_removed=removed.append)
    store.put("a", b"one")
    store.put("a", b"two")
    store.remove("a")
    assert removed == [digest_of(b"one"), digest_of(b"two")]
    for call in (store.get, store.remove, lambda name: store.lease(ME, name)):
        with pytest.raises(ModelNotFound):
            call("a")
    assert store.put("a", b"three")[0].number == 1
    store.close()


def test_versions_stay_up_to_the_bound_and_bytes_go_with_them(tmp_path: Path, shared: tuple[str, str] | None) -> None:
    store = Store(tmp_path, shared, keep_versions=2)
    for data in (b"one", b"two", b"three"):
        store.put("a", data)
    assert store.kept() == {digest_of(b"two"), digest_of(b"three")}
    again, _ = store.put("a", b"two")
    assert (again.number, store.get("a").number) == (2, 2), "bytes that are there already are the version they were"
    lease = store.lease(ME, "a@3")[1]
    store.delete(ME, "a@3")
    assert store.kept() == {digest_of(b"two"), digest_of(b"three")}
    store.release(lease.digest)
    assert store.kept() == {digest_of(b"two")}
    store.close()


def test_a_change_that_comes_too_late_changes_nothing(store: Store) -> None:
    store.put("a", b"one")
    seen = Condition(store.models.find(ME, "a")[0].etag)
    store.change(ME, "a", Change(pinned=True), seen)
    log = store.registry.audit_log()
    for call in (
        lambda: store.change(ME, "a", Change(pinned=False), seen),
        lambda: store.delete(ME, "a", seen),
        lambda: store.put("a", b"two", condition=seen),
    ):
        with pytest.raises(PreconditionFailed):
            call()
    assert store.registry.audit_log() == log and store.get("a").digest == digest_of(b"one")
    assert store.models.find(ME, "a")[0].pinned


@pytest.mark.parametrize("name", ["a", "A9._-", "0", "x" * 128])
def test_good_names_are_taken(store: Store, name: str) -> None:
    assert store.put(name, b"one")[0].number == 1


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "_a", "a/b", "../a", "a b", "a\n", "a\0", "ä", "x" * 129, "a%2f", "a\\b"]
)
def test_bad_names_are_refused_and_nothing_is_kept(store: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidName):
        store.put(name, b"one")
    assert (store.kept(), incoming(tmp_path), store.all()) == (set(), [], [])


def test_an_upload_beyond_the_limit_is_refused(store: Store, tmp_path: Path) -> None:
    upload = store.begin_upload(5)
    upload.write(b"12345")
    with pytest.raises(ArtifactTooLarge):
        upload.write(b"6")
    upload.close()
    assert incoming(tmp_path) == []


def test_another_digest_than_the_promised_one_is_refused(store: Store) -> None:
    upload = store.begin_upload(100)
    upload.write(b"one")
    with pytest.raises(DigestMismatch):
        upload.finish("0" * 64)
    assert upload.finish(digest_of(b"one").upper()) == digest_of(b"one")
    upload.close()


def test_a_start_removes_what_nobody_names(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record, _ = store.put("a", b"one")
    orphan = store.path(digest_of(b"orphan"))
    orphan.parent.mkdir()
    orphan.write_bytes(b"orphan")
    (tmp_path / "incoming" / "half").write_bytes(b"ha")
    store.close()
    store = Store(tmp_path)
    assert (store.kept(), incoming(tmp_path)) == ({record.digest}, [])
    store.close()


def test_a_new_folder_of_objects_is_synced_with_its_parent(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files_module, "sync_directory", synced.append)
    record, _ = local.put("a", b"one")
    assert synced == [tmp_path / "objects", local.path(record.digest).parent]


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


CRASHING = """
import hashlib, json, os, sys
from pathlib import Path
from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.tenants.accounts import Accounts
from deltaserve.tenants.sqlite import SqliteRegistry

def say(*words):
    os.write(1, json.dumps(words).encode() + b"\\n")

def work(i):
    root = Path(sys.argv[1])
    registry = SqliteRegistry(root)
    store, owner = DeltaStore(registry, LocalFiles(root)), Accounts(registry).default
    say("ready", os.getpid())
    while True:
        i += 1
        upload = store.begin_upload(1 << 30)
        data = hashlib.sha256(b"%d" % i).digest() * 3000
        for start in range(0, len(data), 8192):
            upload.write(data[start : start + 8192])
        stored = store.commit(Destination(owner, f"n{i % 3}", "test"), upload, upload.finish(None), {"i": i})
        upload.close()
        say("kept", i, stored.model.name, stored.version.digest)

for line in sys.stdin:
    child = os.fork()
    if not child:
        work(int(line))
    os.waitpid(child, 0)
    say("gone")
"""


def test_a_kill_at_any_point_keeps_what_was_acknowledged_and_nothing_half(tmp_path: Path) -> None:
    chance, last, kept = random.Random(5), 0, {}
    command = [sys.executable, "-c", CRASHING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        for _ in range(12):
            process.stdin.write(f"{last}\n")
            process.stdin.flush()
            ready, pid = json.loads(process.stdout.readline())
            assert ready == "ready"
            deadline = time.monotonic() + chance.uniform(0.0, 0.06)
            while time.monotonic() < deadline:
                pass
            os.kill(pid, signal.SIGKILL)
            for line in iter(process.stdout.readline, '["gone"]\n'):
                _, last, name, _ = json.loads(line)
                kept[name] = last
            last, kept = check_store(tmp_path, last, kept)
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
