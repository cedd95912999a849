"""Uploads in parts (`deltas.files`): they come in any order, several at once, across restarts; complete joins them.

A part is acknowledged after its bytes and its row are synced to disk. What lies here without a row is removed at the
next start; an upload that waits too long for its next part goes with all of them.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakValueDictionary

from deltaserve.deltas.files import part_key, pieces
from deltaserve.deltas.store import DeltaStore, Destination, Stored, Upload
from deltaserve.errors import BadRequest, DigestMismatch, RateLimited
from deltaserve.tenants.accounts import Accounts, Caller, Tenant
from deltaserve.tenants.files import FOR_A_JOB, StagedFile
from deltaserve.tenants.limits import UNLIMITED, Gate, Limits
from deltaserve.tenants.registry import Registry
from deltaserve.tenants.uploads import Part, PartedUpload, PartedUploads, Status

MAX_PART_BYTES = 64 * 2**20  # OpenAI's
MAX_PARALLEL = 16  # parts of one upload that are received at once


class Accept(Protocol):
    """`Intake.accept`."""

    def __call__(
        self, to: Destination, upload: Upload, expected_sha256: str | None, also: Callable[[Stored], None], /
    ) -> Stored: ...


class Stage(Protocol):
    """`Staging.keep`."""

    def __call__(
        self,
        owner: Tenant,
        filename: str,
        purpose: str,
        upload: Upload,
        expected_sha256: str | None,
        also: Callable[[StagedFile], None],
        /,
    ) -> StagedFile: ...


class PartStore:
    """Thread-safe. The bytes that an upload declared count as under way from its first part to its end."""

    def __init__(
        self,
        registry: Registry,
        accounts: Accounts,
        store: DeltaStore,
        accept: Accept,
        gate: Gate,
        *,
        stage: Stage,
        expires_s: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.uploads = PartedUploads(registry, expires_s, clock)
        self._accounts = accounts
        self._store = store
        self._accept = accept
        self._gate = gate
        self._stage = stage
        self._files = store.files
        self._is_shared = registry.is_shared
        self._registry = registry
        self._lock = threading.Lock()  # rows and files of this server's own change together
        self._held: dict[str, PartedUpload] = {}  # those with parts
        self._claims: Counter[str] = Counter()  # uploads → parts being received, and one for those that are held
        self._claiming = threading.Lock()
        self._ends: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # who may end an upload
        self._recover()

    def _recover(self) -> None:
        """What a crash left goes; what was acknowledged counts again."""
        known: set[str] = set()
        for upload in self.uploads.all_pending():
            if keys := self._keys(upload):
                known |= keys
                self._hold(upload)
        if not self._is_shared:
            for key in self._files.keys("parts"):
                if key not in known:
                    self._files.remove(key)
        self.sweep()

    def create(self, to: Destination, *, filename: str, purpose: str, num_bytes: int) -> PartedUpload:
        """Raises RateLimited, NotFound, StorageFull."""
        with self._gate.upload(to.owner.id, to.owner.limits, num_bytes):  # would there be room now?
            return self.uploads.add(
                to.owner, to.name, filename=filename, purpose=purpose, num_bytes=num_bytes, activates=to.activates
            )

    @contextmanager
    def receiving(self, upload: PartedUpload) -> Iterator[None]:
        """While a part of it comes. Raises UploadClosed, RateLimited."""
        upload.check_pending()
        if self._claims[upload.id] - (upload.id in self._held) >= MAX_PARALLEL:
            raise RateLimited(f"{MAX_PARALLEL} parts of this upload are coming already", retry_after_s=1)
        self._claim(upload, self._owner(upload).limits)
        try:
            yield
        finally:
            self._disclaim(upload)

    def begin(self, upload: PartedUpload) -> Upload:
        """A part's bytes on their way in."""
        return self._store.begin_upload(min(MAX_PART_BYTES, upload.num_bytes))

    def keep(self, upload: PartedUpload, file: Upload) -> Part:
        """A received part, within `receiving`. Raises UploadClosed, BadRequest for more bytes than were declared,
        StorageFull."""
        if not file.num_bytes:
            raise BadRequest("the part is empty", param="data")
        digest = file.finish(None)
        with nullcontext() if self._is_shared else self._lock:
            self.uploads.again(upload).check_pending()
            key = part_key(upload.id, digest)
            try:
                named = self._store.bring_in(key, file.path)
                with self._registry.write():
                    part = self.uploads.add_part(upload, digest, file.num_bytes)
                    named()
            except BaseException:
                if not self._is_shared and key not in self._keys(upload):
                    self._files.remove(key)
                raise
            self._hold(upload)
            return part

    def complete(
        self, caller: Caller, upload_id: str, part_ids: Sequence[str], *, md5: str | None, sha256: str | None
    ) -> PartedUpload:
        """The parts in this order become a version of the model, or a file for a job; of a completed upload, what it
        became. Raises NotFound, UploadClosed, BadRequest, DigestMismatch, and whatever is wrong with the artifact: then
        the upload stays as it was."""
        with self._ending(upload_id):
            upload = self.uploads.find(caller, upload_id)
            if upload.result is not None:
                return _as_expected(upload, md5, sha256)
            upload.check_pending()
            try:
                self._complete(caller, upload, part_ids, md5, sha256)
            except Exception:
                now = self.uploads.again(upload)
                if now.result is not None:  # by another server, at the same time
                    return _as_expected(now, md5, sha256)
                raise
            return self.uploads.again(upload)

    def _complete(
        self, caller: Caller, upload: PartedUpload, part_ids: Sequence[str], md5: str | None, sha256: str | None
    ) -> None:
        parts = self._in_order(upload, part_ids)
        gone: list[Part] = []
        file = self._store.begin_upload(upload.num_bytes)
        try:
            found_md5 = self._join(upload, parts, file, with_md5=md5 is not None)
            _check_digest("md5", md5, found_md5)
            owner = self._owner(upload)

            def end(digest: str, **became: Any) -> None:
                told = {**became, "sha256": digest, "md5": found_md5, "created": int(time.time())}
                gone.extend(self._close(upload, Status.COMPLETED, **told))

            if upload.purpose == FOR_A_JOB:

                def kept(staged: StagedFile) -> None:
                    end(staged.sha256, file=staged.id)

                self._stage(owner, upload.filename, upload.purpose, file, sha256, kept)
            else:

                def stored(stored: Stored) -> None:
                    end(stored.version.digest, version=stored.version.number)

                self._accept(Destination(owner, upload.name, str(caller), upload.activates), file, sha256, stored)
        finally:
            file.close()
        with self._lock:
            self._clear(upload, gone)

    def cancel(self, caller: Caller, upload_id: str) -> PartedUpload:
        """May be called again. Raises NotFound, UploadClosed."""
        with self._ending(upload_id):
            upload = self.uploads.find(caller, upload_id)
            if upload.status is not Status.CANCELLED:
                upload.check_pending()
                self._end(upload, Status.CANCELLED)
        return self.uploads.again(upload)

    def cancel_all(self, tenant: Tenant) -> None:
        for upload in self.uploads.all_pending():
            if upload.tenant_id == tenant.id:
                with self._ending(upload.id):
                    if self.uploads.again(upload).result is None:
                        self._end(upload, Status.CANCELLED)

    def sweep(self) -> None:
        """Ends what has expired; called every now and then."""
        for upload in self.uploads.all_pending():
            if upload.status is Status.EXPIRED:
                with self._ending(upload.id):
                    now = self.uploads.again(upload)
                    if now.status is Status.EXPIRED:
                        self._end(now, Status.EXPIRED)
        for upload in list(self._held.values()) if self._is_shared else ():
            if self.uploads.has_ended(upload):
                self._clear(upload, ())
        self.uploads.forget_old()

    def _owner(self, upload: PartedUpload) -> Tenant:
        return self._accounts.owner(upload.tenant_id, "upload")

    @contextmanager
    def _ending(self, upload_id: str) -> Iterator[None]:
        with self._claiming:
            lock = self._ends.setdefault(upload_id, threading.Lock())
        with lock:
            yield

    def _in_order(self, upload: PartedUpload, part_ids: Sequence[str]) -> list[Part]:
        here = {part.id: part for part in self.uploads.parts(upload)}
        absent = [part_id for part_id in part_ids if part_id not in here]
        if absent:
            raise BadRequest(f"upload {upload.id} has no part {absent[0][:200]!r}", param="part_ids")
        parts = [here[part_id] for part_id in part_ids]
        total = sum(part.num_bytes for part in parts)
        if total != upload.num_bytes:
            raise BadRequest(f"these parts are {total} bytes; {upload.num_bytes} were declared", param="part_ids")
        return parts

    def _join(self, upload: PartedUpload, parts: Sequence[Part], file: Upload, *, with_md5: bool) -> str | None:
        digest = hashlib.md5(usedforsecurity=False) if with_md5 else None
        for part in parts:
            with self._files.reading(part_key(upload.id, part.sha256)) as path, path.open("rb") as source:
                for piece in pieces(source):
                    file.write(piece)
                    if digest:
                        digest.update(piece)
        return digest.hexdigest() if digest else None

    def _end(self, upload: PartedUpload, status: Status) -> None:
        with self._lock:
            self._clear(upload, self._close(upload, status))

    def _close(self, upload: PartedUpload, status: Status, **result: Any) -> list[Part]:
        """Raises UploadClosed where another server has ended it."""
        with self._registry.write():
            now = self.uploads.again(upload)
            if now.status in (Status.COMPLETED, Status.CANCELLED):
                now.check_pending()
            parts = self.uploads.close(upload, status, **result)
            if self._is_shared:
                self._store.removals.note((part_key(upload.id, part.sha256) for part in parts), 0)
            return parts

    def _clear(self, upload: PartedUpload, parts: Sequence[Part]) -> None:
        if self._held.pop(upload.id, None):
            self._disclaim(upload)
        if not self._is_shared:
            for part in parts:
                self._files.remove(part_key(upload.id, part.sha256))

    def _keys(self, upload: PartedUpload) -> set[str]:
        return {part_key(upload.id, part.sha256) for part in self.uploads.parts(upload)}

    def _hold(self, upload: PartedUpload) -> None:
        if upload.id not in self._held:
            self._held[upload.id] = upload
            self._claim(upload, UNLIMITED)

    def _claim(self, upload: PartedUpload, limits: Limits) -> None:
        with self._claiming:
            if not self._claims[upload.id]:
                self._gate.reserve(upload.tenant_id, limits, upload.num_bytes)
            self._claims[upload.id] += 1

    def _disclaim(self, upload: PartedUpload) -> None:
        with self._claiming:
            self._claims[upload.id] -= 1
            if not self._claims[upload.id]:
                del self._claims[upload.id]
                self._gate.release(upload.tenant_id, upload.num_bytes)


def _as_expected(upload: PartedUpload, md5: str | None, sha256: str | None) -> PartedUpload:
    """A completed upload. Raises DigestMismatch."""
    assert upload.result is not None
    _check_digest("md5", md5, upload.result["md5"] or md5)
    _check_digest("sha256", sha256, upload.result["sha256"])
    return upload


def _check_digest(kind: str, given: str | None, found: str | None) -> None:
    if given is not None and given.lower() != (found or "").lower():
        raise DigestMismatch(f"{kind} of the joined parts is {found}, not {given}", param=kind)
