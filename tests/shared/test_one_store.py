"""Two servers' stores on one PostgreSQL and one S3: no file goes that is named or may be read, every other does."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas import store as store_module
from deltaserve.deltas.parts import PartStore
from deltaserve.deltas.places import open_places
from deltaserve.deltas.staging import Staging
from deltaserve.deltas.store import DeltaStore, Destination, Stored, Upload
from deltaserve.errors import ModelNotFound, QuotaExceeded, StoreUnavailable, UploadClosed
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.accounts import Accounts, Caller, Scope
from deltaserve.tenants.limits import Gate
from deltaserve.tenants.uploads import PartedUpload, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ONE = hashlib.sha256(b"one").hexdigest()


class Server:
    """What one server has of registry and files, and short ways to ask it."""

    def __init__(self, store: str, registry: str, cache: Path) -> None:
        self.registry, self.files = open_places(store, registry, cache, 1 << 20)
        self.accounts = Accounts(self.registry)
        self.me = Caller(self.accounts.default, "k", frozenset({Scope.MANAGE}))
        self.removed: list[str] = []
        self.store = DeltaStore(self.registry, self.files, keep_versions=2, on_removed=self.removed.append)
        staging = Staging(self.registry, self.store, expires_s=100)
        self.parts = PartStore(
            self.registry, self.accounts, self.store, self._accept, Gate(), stage=staging.keep, expires_s=100
        )

    def _accept(self, to: Destination, file: Upload, sha256: str | None, also: Callable[[Stored], None]) -> Stored:
        return self.store.commit(to, file, file.finish(sha256), {}, also)

    def put(self, name: str, data: bytes) -> Stored:
        file = self.store.begin_upload(100)
        try:
            file.write(data)
            return self.store.commit(Destination(self.accounts.default, name, "test"), file, file.finish(None), {})
        finally:
            file.close()

    def read(self, digest: str) -> bytes:
        with self.store.reading(DeltaDigest(digest)) as path:
            return path.read_bytes()

    def send(self, upload: PartedUpload, data: bytes) -> str:
        with self.parts.receiving(upload):
            file = self.parts.begin(upload)
            try:
                file.write(data)
                return self.parts.keep(upload, file).id
            finally:
                file.close()

    def begin(self, num_bytes: int) -> PartedUpload:
        to = Destination(self.accounts.default, "m", "test")
        return self.parts.create(to, filename="m", purpose="", num_bytes=num_bytes)

    def complete(self, upload: PartedUpload, *parts: str) -> PartedUpload:
        return self.parts.complete(self.me, upload.id, parts, md5=None, sha256=None)

    def objects(self) -> list[str]:
        return [key.rpartition("/")[2].partition(".")[0] for key in self.files.keys("objects")]

    def let_time_pass(self) -> None:
        """An hour and more."""
        with self.registry.write() as db:
            db.execute("UPDATE removals SET due = 0")


@pytest.fixture
def servers(postgres_url: str, s3_url: str, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    made = Server(s3_url, postgres_url, tmp_path / "a"), Server(s3_url, postgres_url, tmp_path / "b")
    yield made
    for server in made:
        server.registry.close()
        server.files.close()


def test_what_a_killed_server_had_begun_is_seen_by_nobody_and_goes_in_time(servers: tuple[Server, Server]) -> None:
    a, b = servers
    file = a.store.begin_upload(100)
    file.write(b"one")
    a.store.bring_in(f"objects/{ONE[:2]}/{file.finish(None)}.safetensors", file.path)  # and no more of it
    file.close()
    assert b.store.models.visible(b.me) == []
    b.store.sweep()
    assert b.objects() == [ONE], "it may be a moment before its row"
    b.let_time_pass()
    b.store.sweep()
    assert b.objects() == [] and b.registry.rows("SELECT * FROM removals") == []


def test_a_refused_upload_of_bytes_that_another_model_has_takes_them_from_nobody(
    servers: tuple[Server, Server],
) -> None:
    a, b = servers
    a.put("m", b"one")
    a.accounts.limit(a.accounts.default, {"max_models": 1}, "test")
    b.accounts.reload()
    with pytest.raises(QuotaExceeded):
        b.put("other", b"one")
    b.let_time_pass()
    b.store.sweep()
    assert a.read(ONE) == b"one" and a.objects() == [ONE]


def test_bytes_that_come_again_when_they_are_due_to_go_stay(
    servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = servers
    a.put("m", b"one")
    a.store.delete(a.me, "m")
    a.let_time_pass()
    true = b.files.put

    def put_while_the_other_sweeps(key: str, source: Path) -> None:
        a.store.sweep()
        true(key, source)
        a.store.sweep()

    monkeypatch.setattr(b.files, "put", put_while_the_other_sweeps)
    b.put("m", b"one")
    a.let_time_pass()
    a.store.sweep()
    assert a.objects() == [ONE] and a.registry.rows("SELECT * FROM removals") == []


def test_a_deleted_model_can_be_read_by_who_was_reading_it(servers: tuple[Server, Server]) -> None:
    a, b = servers
    a.put("m", b"one")
    _, version = b.store.lease(b.me, "m")
    a.store.delete(a.me, "m")
    a.store.sweep()
    with pytest.raises(ModelNotFound):
        b.store.lease(b.me, "m")
    assert b.read(ONE) == b"one", "for an hour, whoever reads"
    b.let_time_pass()
    b.store.sweep()
    assert b.objects() == [ONE], "nor after it under its own lease"
    b.store.release(version.digest)
    b.store.sweep()
    assert b.objects() == [] and b.removed == [ONE]


def test_an_upload_that_takes_longer_than_files_wait_is_not_acknowledged(
    servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = servers
    clock = iter([0.0, store_module.GRACE_S])
    with monkeypatch.context() as patch:
        patch.setattr(store_module.time, "monotonic", lambda: next(clock))
        with pytest.raises(StoreUnavailable, match="too long"):
            a.put("m", b"one")
    assert a.store.models.visible(a.me) == []
    a.put("m", b"one")


def test_an_upload_is_completed_once_whoever_is_asked(servers: tuple[Server, Server], at_once: Any) -> None:
    a, b = servers
    for round_number in range(3):
        upload = a.begin(3)
        parts = [a.send(upload, b"o%d" % round_number), b.send(upload, b"e")]
        calls = [lambda server=server: server.complete(upload, *parts) for server in servers * 2]  # noqa: B023
        results = at_once(calls)
        assert len({repr(result) for result in results}) == 1 and results[0].status is Status.COMPLETED
    assert len(a.store.models.versions(a.store.models.of(a.me.tenant.id)[0])) == 2, "as many as are kept, of three"
    a.let_time_pass()
    a.store.sweep()
    assert list(a.files.keys("parts")) == [] and len(a.objects()) == 2


def test_of_complete_and_cancel_at_once_one_wins(servers: tuple[Server, Server], at_once: Any) -> None:
    a, b = servers

    def tried(call: Callable[[], Any]) -> Any:
        try:
            return call().status
        except Exception as error:
            return type(error)

    for _ in range(5):
        upload = a.begin(3)
        part = a.send(upload, b"one")
        told = at_once(
            [
                lambda: tried(lambda: a.complete(upload, part)),  # noqa: B023
                lambda: tried(lambda: b.parts.cancel(b.me, upload.id)),  # noqa: B023
            ]
        )
        now = a.parts.uploads.again(upload).status
        assert now in told and now in (Status.COMPLETED, Status.CANCELLED), told
        if now is Status.COMPLETED:
            assert told[1] is UploadClosed and b.read(ONE) == b"one"
            b.store.delete(b.me, "m")
        else:
            assert b.store.models.visible(b.me) == []


def test_what_another_server_ended_counts_as_under_way_no_more_after_a_sweep(servers: tuple[Server, Server]) -> None:
    a, b = servers
    upload = a.begin(3)
    part = a.send(upload, b"one")
    b.complete(upload, part)
    with a.parts._gate.account(a.me.tenant.id, a.me.tenant.limits) as account:
        assert account.uploading == 3
        a.parts.sweep()
        assert account.uploading == 0
