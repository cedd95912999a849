"""Uploaded deltas: immutable objects named by their digest (`deltas.files`); the registry's names point to them.

An upload is acknowledged after its bytes and its registry row are synced to disk. A crash at any point leaves the old
state or the new one: an object without a row is removed at the next start. An object goes when no version names it and
no request leases it.

Where servers share the registry they share the files, and none knows what the others read. There an object goes
`GRACE_S` after its last name, and one that never got a name as long after it came (`tenants.removals`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.deltas.files import Files, object_key
from deltaserve.errors import ArtifactTooLarge, DigestMismatch, StoreUnavailable
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.accounts import Caller, Tenant
from deltaserve.tenants.models import ALWAYS, Change, Condition, Model, Models, Version, check_name
from deltaserve.tenants.registry import Registry, disk_full_is_an_answer
from deltaserve.tenants.removals import Removals

GRACE_S = 3600  # longer than any request

EXPIRY = "server/expiry"  # who deletes, in the log


@dataclass(frozen=True)
class Destination:
    """Where an upload goes: a name of `owner`'s, in the log as done by `by`. Unless it `activates`, a name that was
    there points where it pointed."""

    owner: Tenant
    name: str
    by: str
    activates: bool = True
    condition: Condition = ALWAYS

    def __str__(self) -> str:
        return f"{self.owner.name}:{self.name}"


@dataclass(frozen=True)
class Stored:
    """What came of an upload."""

    model: Model
    version: Version
    is_new_name: bool


class Upload:
    """Bytes on their way in. Closed without `finish`, it leaves nothing."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        with disk_full_is_an_answer():
            descriptor, path = tempfile.mkstemp(dir=directory)
        self.path = Path(path)
        self._file = os.fdopen(descriptor, "wb")

    def write(self, data: bytes) -> None:
        """Raises ArtifactTooLarge, StorageFull."""
        self.num_bytes += len(data)
        if self.num_bytes > self._max_bytes:
            raise ArtifactTooLarge(f"the upload is over {self._max_bytes} bytes, the most that is accepted")
        self._digest.update(data)
        with disk_full_is_an_answer():
            self._file.write(data)

    def finish(self, expected_sha256: str | None) -> DeltaDigest:
        """Syncs the bytes to disk. Raises DigestMismatch, StorageFull."""
        digest = self._digest.hexdigest()
        if expected_sha256 is not None and expected_sha256.lower() != digest:
            raise DigestMismatch(
                f"sha256 of the {self.num_bytes} bytes received is {digest}, not {expected_sha256}", param="sha256"
            )
        with disk_full_is_an_answer():
            self._file.flush()
            os.fsync(self._file.fileno())
        return DeltaDigest(digest)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()  # a full disk may refuse the rest of the buffer
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed: a start does it
            self.path.unlink(missing_ok=True)


class DeltaStore:
    """Thread-safe. `keep_versions`: how many of a model stay, beside those that its name points to."""

    def __init__(
        self,
        registry: Registry,
        files: Files,
        *,
        keep_versions: int = 1,
        grace_s: int = GRACE_S,
        on_removed: Callable[[DeltaDigest], None] = lambda digest: None,
    ) -> None:
        self.models = Models(registry)
        self.files = files
        self.removals = Removals(registry)
        self._registry = registry
        self._keep_versions = keep_versions
        self._grace_s = grace_s
        self._on_removed = on_removed
        self._lock = threading.Lock()  # a lease begins, or an object goes
        self._leases: Counter[DeltaDigest] = Counter()
        if not registry.is_shared:
            for key in files.keys("objects"):
                self._remove_if_unused(_digest(key))

    def begin_upload(self, max_bytes: int) -> Upload:
        return Upload(self.files.incoming, max_bytes)

    def commit(
        self,
        to: Destination,
        upload: Upload,
        digest: DeltaDigest,
        summary: dict[str, Any],
        also: Callable[[Stored], None] = lambda stored: None,
    ) -> Stored:
        """A finished upload becomes a version, and the name points to it. Bytes that the model has already are the
        version they were. `also` is written with it, or neither is. Raises InvalidName, StorageFull."""
        check_name(to.name)
        self.delete_expired()  # or a new version would end with the old ones
        with self._kept(digest):  # if nothing comes of it, it goes
            named = self.bring_in(object_key(digest), upload.path)
            with self._registry.write():  # the new version comes and an old one goes, or neither
                stored, replaced, is_new = self._record(to, upload.num_bytes, digest, summary)
                also(stored)
                named()
                self._lost_a_name(replaced)
                if is_new:
                    self.models.check_quota(to.owner)
        for old in replaced:
            self._remove_if_unused(old)
        return stored

    def bring_in(self, key: str, source: Path) -> Callable[[], None]:
        """Moves a file in; → what to call in the transaction that names it."""
        if not self._registry.is_shared:
            self.files.put(key, source)
            return lambda: None
        began = time.monotonic()
        self.removals.note([key], self._grace_s)
        self.files.put(key, source)

        def named() -> None:
            if time.monotonic() - began > self._grace_s / 2:
                raise StoreUnavailable("the store took too long to take this; nothing of it is kept")
            self.removals.take_back(key)

        return named

    def _record(
        self, to: Destination, num_bytes: int, digest: DeltaDigest, summary: dict[str, Any]
    ) -> tuple[Stored, list[DeltaDigest], bool]:
        before = self.models.own(to.owner.id, to.name)
        to.condition.check(before)
        known = self.models.versions(before) if before else []
        version = next((known for known in known if known.digest == digest), None)
        is_new = version is None
        if version is None:
            version = self.models.add(to.owner.id, to.name, digest, num_bytes, summary)
            self._registry.audit(to.by, "model.upload", f"{to}@{version.number}", digest, bytes=num_bytes)
        model = self.models.own(to.owner.id, to.name)
        assert model is not None
        if to.activates and model.active.number != version.number:
            if not is_new:
                self._registry.audit(to.by, "model.change", str(to), digest, version=version.number)
            self.models.point(model, version.number)
            model = self.models.again(model)
        pruned = self.models.prune(model, self._keep_versions)
        return Stored(model, version, before is None), pruned, is_new

    def lease(self, caller: Caller, called: str, draw: str = "") -> tuple[Model, Version]:
        """The version that answers a request for the model `called`; its object stays on disk until `release`. `draw`
        decides between the name's version and its canary. Raises ModelNotFound."""
        with self._lock:
            model, version = self.models.find(caller, called)
            version = version or self.models.chosen(model, draw)
            self._leases[version.digest] += 1
            return model, version

    def release(self, digest: DeltaDigest) -> None:
        with self._lock:
            self._leases[digest] -= 1
            if self._leases[digest]:
                return
            del self._leases[digest]
        self._remove_if_unused(digest)

    @contextmanager
    def _kept(self, digest: DeltaDigest) -> Iterator[None]:
        """A lease of what may have no name yet."""
        with self._lock:
            self._leases[digest] += 1
        try:
            yield
        finally:
            self.release(digest)

    def change(self, caller: Caller, called: str, change: Change, condition: Condition = ALWAYS) -> Model:
        """Raises ModelNotFound, PermissionDenied, PreconditionFailed, StorageFull."""
        with self._registry.write():
            before, _ = self.models.owned(caller, called)
            condition.check(before)
            after = self.models.change(before, change)
            told: dict[str, Any] = {}
            if change.version is not None:
                told["version"] = change.version
            if change.canary is not None:
                told["canary"] = vars(change.canary)
            if change.pinned is not None:
                told["pinned"] = change.pinned
            if change.expires is not None:
                told["expires"] = change.expires or None
            if change.shared_with is not None:
                told["shared_with"] = list(after.shared_with)
            target = f"{after.owner}:{after.name}"
            self._registry.audit(str(caller), "model.change", target, after.active.digest, **told)
            return after

    def delete(self, caller: Caller, called: str, condition: Condition = ALWAYS) -> None:
        """Forgets every version of a model, or the one that is named; running requests finish on theirs. Raises
        ModelNotFound, PermissionDenied, PreconditionFailed, VersionInUse, StorageFull."""
        with self._registry.write():
            model, version = self.models.owned(caller, called)
            condition.check(model)
            if version is None:
                gone = self._forget([model], str(caller))
            else:
                self.models.drop(model, version)
                target = f"{model.owner}:{model.name}@{version.number}"
                self._registry.audit(str(caller), "version.delete", target, version.digest)
                gone = [version.digest]
                self._lost_a_name(gone)
        for digest in gone:
            self._remove_if_unused(digest)

    def delete_all(self, tenant: Tenant, by: str) -> None:
        """`delete` of every model of a tenant, or of none."""
        with self._registry.write():
            gone = self._forget(self.models.of(tenant.id), by)
        for digest in gone:
            self._remove_if_unused(digest)

    def delete_expired(self) -> None:
        """What was to live until now; running requests finish. Raises StorageFull."""
        now = time.time()
        if not self.models.expired(now):
            return
        with self._registry.write():
            gone = self._forget(self.models.expired(now), EXPIRY)
        for digest in gone:
            self._remove_if_unused(digest)

    def _forget(self, models: Sequence[Model], by: str) -> list[DeltaDigest]:
        gone: list[DeltaDigest] = []
        for model in models:
            gone += self.models.forget(model)
            self._registry.audit(by, "model.delete", f"{model.owner}:{model.name}", model.active.digest)
        self._lost_a_name(gone)
        return gone

    def reading(self, digest: DeltaDigest) -> AbstractContextManager[Path]:
        """The object as a file on this disk, while it is read. Raises FileNotFoundError."""
        return self.files.reading(object_key(digest))

    def sweep(self) -> None:
        """Removes what has been due for removal, where files are shared; called every now and then. One at a time, in a
        transaction each: no server can name a file while another removes it."""
        for key in self.removals.due():
            if key.startswith("objects/") and self._leases[_digest(key)]:
                continue
            with self._registry.write():
                if self.removals.take(key):
                    self.files.remove(key)
            self._on_removed(_digest(key))

    def _lost_a_name(self, digests: Sequence[DeltaDigest]) -> None:
        """Within the transaction that took it."""
        if self._registry.is_shared:
            self.removals.note(
                (object_key(digest) for digest in digests if not self.models.is_named(digest)), self._grace_s
            )

    def _remove_if_unused(self, digest: DeltaDigest) -> None:
        if self._registry.is_shared:
            return
        with self._lock:
            if self._leases[digest] or self.models.is_named(digest):
                return
            self.files.remove(object_key(digest))
            self._on_removed(digest)


def _digest(key: str) -> DeltaDigest:
    return DeltaDigest(Path(key).stem)
