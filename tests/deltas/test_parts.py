"""Uploads in parts: what counts against a tenant, what expires, what a restart keeps, what is done at once."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas import parts as parts_module
from deltaserve.deltas.parts import PartStore
from deltaserve.deltas.places import open_places
from deltaserve.deltas.staging import Staging
from deltaserve.deltas.store import DeltaStore, Destination, Stored, Upload
from deltaserve.errors import (
    BadRequest,
    DigestMismatch,
    NotFound,
    QuotaExceeded,
    RateLimited,
    RegistryUnavailable,
    StorageFull,
    UploadClosed,
)
from deltaserve.tenants import uploads as uploads_module
from deltaserve.tenants.accounts import Accounts, Caller, Scope, Tenant
from deltaserve.tenants.limits import Gate
from deltaserve.tenants.uploads import KEPT_S, Part, PartedUpload, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

EXPIRES_S = 100


class Yard:
    """A store with a clock that stands still, and short ways to ask it as the tenant acme."""

    def __init__(self, root: Path, shared: tuple[str, str] | None = None, now: float = 1_700_000_000.0) -> None:
        """`shared`: URLs of a registry and a bucket that other servers have too."""
        self.root = root
        self.now = now
        self._places = (shared[1], shared[0]) if shared else (str(root), None)
        self.accepting: Callable[[], None] = lambda: None
        self.open()

    def open(self) -> None:
        self.registry, self.on_disk = open_places(*self._places, self.root, 1 << 20)
        self.accounts = Accounts(self.registry)
        if "acme" not in [tenant.name for tenant in self.accounts.all()]:
            self.accounts.create("acme", "test")
        self.store = DeltaStore(self.registry, self.on_disk, keep_versions=9)
        self.gate = Gate()
        self.staging = Staging(self.registry, self.store, expires_s=EXPIRES_S, clock=lambda: self.now)
        self.parts = PartStore(
            self.registry, self.accounts, self.store, self._accept, self.gate, stage=self.staging.keep,
            expires_s=EXPIRES_S, clock=lambda: self.now,
        )  # fmt: skip

    def _accept(self, to: Destination, file: Upload, sha256: str | None, also: Callable[[Stored], None]) -> Stored:
        self.accepting()
        return self.store.commit(to, file, file.finish(sha256), {}, also)

    def restart(self) -> None:
        self.close()
        self.open()

    def close(self) -> None:
        self.registry.close()
        self.on_disk.close()

    @property
    def acme(self) -> Tenant:
        return self.accounts.named("acme")

    @property
    def me(self) -> Caller:
        return Caller(self.acme, "k", frozenset({Scope.MANAGE}))

    def limit(self, **limits: int) -> None:
        self.accounts.limit(self.acme, dict(limits), "test")

    def create(self, num_bytes: int, name: str = "m", *, activates: bool = True) -> PartedUpload:
        to = Destination(self.acme, name, "test", activates)
        return self.parts.create(to, filename=f"{name}.safetensors", purpose="fine-tune", num_bytes=num_bytes)

    def send(self, upload: PartedUpload, data: bytes) -> Part:
        with self.parts.receiving(upload):
            file = self.parts.begin(upload)
            try:
                file.write(data)
                return self.parts.keep(upload, file)
            finally:
                file.close()

    def complete(self, upload: PartedUpload, *parts: Part, **digests: str | None) -> PartedUpload:
        expected = {"md5": None, "sha256": None, **digests}
        return self.parts.complete(self.me, upload.id, [part.id for part in parts], **expected)

    @property
    def under_way(self) -> int:
        with self.gate.account(self.acme.id, self.acme.limits) as account:
            return account.uploading

    def files(self) -> list[str]:
        """Parts, and what is on its way in, when all has gone that may."""
        if self.registry.is_shared:
            with self.registry.write() as db:
                db.execute("UPDATE removals SET due = 0")
            self.store.sweep()
        found = [key.rpartition("/")[2] for key in self.on_disk.keys("parts")]
        return sorted(found + [path.name for path in self.on_disk.incoming.iterdir()])

    def content(self, name: str) -> bytes:
        with self.store.reading(self.store.models.find(self.me, name)[0].active.digest) as path:
            return path.read_bytes()


@pytest.fixture(params=["local", "shared"])
def yard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Yard]:
    both = ("postgres_url", "s3_url") if request.param == "shared" else ()
    made = Yard(tmp_path, tuple(request.getfixturevalue(name) for name in both) or None)  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Yard]:
    made = Yard(tmp_path)
    yield made
    made.close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_parts_are_joined_in_the_order_that_is_asked_and_leave_nothing(yard: Yard) -> None:
    upload = yard.create(6)
    last, first = yard.send(upload, b"cd"), yard.send(upload, b"ab")
    assert yard.parts.uploads.parts(upload) == [last, first]
    done = yard.complete(upload, first, last, first, sha256=sha256(b"abcdab"), md5=hashlib.md5(b"abcdab").hexdigest())
    assert (done.status, yard.content("m"), yard.files(), yard.under_way) == ("completed", b"abcdab", [], 0)
    assert done.result is not None and (done.result["version"], done.result["sha256"]) == (1, sha256(b"abcdab"))
    assert yard.complete(upload, first) == done, "a repeated request changes nothing"
    for wrong in ({"md5": "0" * 32}, {"sha256": "0" * 64}):
        with pytest.raises(DigestMismatch):
            yard.complete(upload, first, **wrong)


def test_everything_acknowledged_survives_a_restart(yard: Yard) -> None:
    upload = yard.create(4)
    first = yard.send(upload, b"ab")
    if not yard.registry.is_shared:
        for stray in (yard.root / "parts" / upload.id / "stray", yard.root / "parts" / "upload_of_nobody" / "stray"):
            stray.parent.mkdir(exist_ok=True)
            stray.write_bytes(b"x")
    yard.restart()
    assert yard.files() == [first.sha256] and yard.under_way == 4
    assert yard.parts.uploads.find(yard.me, upload.id).status is Status.PENDING
    last = yard.send(upload, b"cd")
    yard.complete(upload, first, last)
    yard.restart()
    assert (yard.content("m"), yard.files(), yard.under_way) == (b"abcd", [], 0)
    assert yard.complete(upload, first, last).status is Status.COMPLETED


def test_a_failed_complete_leaves_the_upload_as_it_was(yard: Yard) -> None:
    yard.limit(max_models=0)
    upload = yard.create(2)
    part = yard.send(upload, b"ab")
    with pytest.raises(QuotaExceeded):
        yard.complete(upload, part)
    assert yard.files() == [part.sha256] and yard.store.models.of(yard.acme.id) == []
    yard.limit(max_models=1)
    assert yard.complete(upload, part).status is Status.COMPLETED


def test_an_upload_that_does_not_activate_leaves_the_name(yard: Yard) -> None:
    for data, activates in ((b"a", True), (b"b", False)):
        upload = yard.create(1, activates=activates)
        yard.complete(upload, yard.send(upload, data))
    assert yard.content("m") == b"a"


def test_declared_bytes_count_from_the_first_part_to_the_end(yard: Yard) -> None:
    yard.limit(max_bytes=10)
    with pytest.raises(RateLimited):
        yard.create(11)
    first, second, third = yard.create(6), yard.create(6), yard.create(4)
    yard.send(first, b"a")
    assert yard.under_way == 6
    with pytest.raises(RateLimited):
        yard.send(second, b"b")
    with pytest.raises(RateLimited):
        yard.create(5)
    with pytest.raises(RateLimited):
        yard.gate.upload(yard.acme.id, yard.acme.limits, 5).__enter__()
    yard.send(third, b"c")
    yard.restart()
    assert yard.under_way == 10
    yard.parts.cancel(yard.me, first.id)
    assert yard.under_way == 4
    yard.send(second, b"b")
    assert yard.under_way == 10


def test_a_part_that_does_not_arrive_counts_no_more(yard: Yard) -> None:
    upload = yard.create(5)
    with pytest.raises(ConnectionError), yard.parts.receiving(upload):
        assert yard.under_way == 5
        raise ConnectionError
    assert yard.under_way == 0
    with pytest.raises(BadRequest, match="empty"):
        yard.send(upload, b"")
    yard.send(upload, b"abc")
    with pytest.raises(BadRequest, match="declared"):
        yard.send(upload, b"def")
    assert yard.under_way == 5 and yard.files() == [sha256(b"abc")]


def test_an_upload_expires_after_its_last_part(yard: Yard) -> None:
    upload, other = yard.create(4), yard.create(4)
    yard.now += EXPIRES_S - 1
    yard.send(upload, b"ab")
    yard.now += EXPIRES_S - 1
    yard.parts.sweep()
    assert yard.parts.uploads.again(other).status is Status.EXPIRED and yard.files() == [sha256(b"ab")]
    yard.send(upload, b"ab")
    yard.now += EXPIRES_S
    with pytest.raises(UploadClosed, match="expired"):
        yard.send(upload, b"cd")
    with pytest.raises(UploadClosed, match="expired"):
        yard.complete(upload)
    yard.parts.sweep()
    assert (yard.files(), yard.under_way) == ([], 0)
    yard.now += KEPT_S + 1
    yard.parts.sweep()
    with pytest.raises(NotFound):
        yard.parts.uploads.find(yard.me, upload.id)
    assert yard.registry.rows("SELECT * FROM uploads") == []


def test_what_expired_while_the_server_was_down_is_gone_at_start(yard: Yard) -> None:
    yard.send(yard.create(2), b"ab")
    yard.now += EXPIRES_S
    yard.restart()
    assert (yard.files(), yard.under_way) == ([], 0)


def test_parts_that_come_at_once_are_each_kept_once(yard: Yard, at_once: Any) -> None:
    pieces = [bytes([number]) * 100 for number in range(8)]
    upload = yard.create(800)
    with_repeats = [*pieces, *pieces]
    parts = at_once([lambda piece=piece: yard.send(upload, piece) for piece in with_repeats])
    assert parts[:8] == parts[8:] and len(yard.files()) == 8
    done = at_once([lambda: yard.complete(upload, *parts[:8])] * 4)
    assert len({repr(one) for one in done}) == 1 and yard.content("m") == b"".join(pieces)
    assert len(yard.store.models.versions(yard.store.models.of(yard.acme.id)[0])) == 1


def test_an_upload_that_is_being_completed_ends_only_then(yard: Yard) -> None:
    upload = yard.create(2)
    part = yard.send(upload, b"ab")
    began, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        assert go_on.wait(30)

    yard.accepting = wait
    done: list[Any] = []

    def cancel() -> None:
        try:
            done.append(yard.parts.cancel(yard.me, upload.id))
        except UploadClosed as error:
            done.append(error)

    completing = threading.Thread(target=lambda: done.append(yard.complete(upload, part)))
    completing.start()
    assert began.wait(30)
    cancelling = threading.Thread(target=cancel)
    cancelling.start()
    go_on.set()
    completing.join()
    cancelling.join()
    assert {type(one) for one in done} == {PartedUpload, UploadClosed}
    assert yard.content("m") == b"ab"


def test_a_full_disk_loses_no_part_and_keeps_nothing_of_the_new_one(
    local: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = local.create(4)
    first = local.send(upload, b"ab")

    def full(*args: Any) -> Any:  # noqa: ARG001
        raise OSError(errno.ENOSPC, "no space")

    for call in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(StorageFull):
            patch.setattr(os, call, full)
            local.send(upload, b"cd")
        assert local.files() == [first.sha256]
    local.registry.rows("PRAGMA query_only = ON")
    with pytest.raises(RegistryUnavailable):
        local.send(upload, b"cd")
    local.registry.rows("PRAGMA query_only = OFF")
    assert local.files() == [first.sha256] and local.parts.uploads.parts(upload) == [first]
    assert local.complete(upload, first, local.send(upload, b"cd")).status is Status.COMPLETED


def test_bounds_of_parts_and_uploads(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "MAX_PARTS", 2)
    monkeypatch.setattr(uploads_module, "MAX_PENDING", 2)
    monkeypatch.setattr(parts_module, "MAX_PARALLEL", 2)
    upload, other = yard.create(9), yard.create(1)
    with pytest.raises(RateLimited, match="pending"):
        yard.create(1)
    yard.parts.cancel(yard.me, other.id)
    yard.create(1)
    yard.send(upload, b"a")
    with yard.parts.receiving(upload), yard.parts.receiving(upload), pytest.raises(RateLimited):
        yard.parts.receiving(upload).__enter__()
    yard.send(upload, b"b")
    yard.send(upload, b"b")
    with pytest.raises(BadRequest, match="at most 2 parts"):
        yard.send(upload, b"c")


def test_a_deleted_tenants_uploads_go(yard: Yard) -> None:
    upload = yard.create(2)
    yard.send(upload, b"ab")
    acme = yard.acme
    yard.parts.cancel_all(acme)
    assert yard.files() == [] and yard.parts.uploads.again(upload).status is Status.CANCELLED
    late = yard.create(1)
    yard.accounts.delete(acme, "test")
    with pytest.raises(NotFound), yard.parts.receiving(late):
        pass
    with pytest.raises(NotFound, match="deleted"):
        yard.parts.create(Destination(acme, "m", "test"), filename="m", purpose="", num_bytes=1)


def test_another_tenants_upload_is_told_apart_from_none_by_nothing_but_its_id(yard: Yard) -> None:
    upload = yard.create(1)
    other = Caller(yard.accounts.create("globex", "test"), "k", frozenset({Scope.MANAGE}))
    told = []
    for upload_id in (upload.id, "upload_none"):
        with pytest.raises(NotFound) as caught:
            yard.parts.uploads.find(other, upload_id)
        told.append(caught.value.message.replace(upload_id, "…"))
    assert told[0] == told[1]
    admin = Caller(yard.accounts.default, "k", frozenset({Scope.ADMIN}))
    assert yard.parts.uploads.find(admin, upload.id) == upload
