"""What was acknowledged stays, what was not leaves nothing, on a full disk and after a kill at any point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltaserve.deltas import files as files_module
from deltaserve.errors import (
    ArtifactTooLarge,
    DigestMismatch,
    InvalidName,
    ModelNotFound,
    PreconditionFailed,
    StoreInUse,
)
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.models import Change, Condition

from .storehouse import ME, Store, digest_of, incoming

if TYPE_CHECKING:
    from pathlib import Path


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
