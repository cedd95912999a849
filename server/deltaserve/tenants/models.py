"""Models: a tenant's names, each a pointer into its immutable versions.

    NAME              the caller's own model, at the version it points to (or, for a share of requests, its canary)
    NAME@VERSION      one version of it
    TENANT:NAME       another tenant's: for admins, and for those it is shared with

What a caller may not see does not exist: the same ModelNotFound.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaserve.errors import (
    InvalidName,
    ModelNotFound,
    PermissionDenied,
    PreconditionFailed,
    QuotaExceeded,
    VersionInUse,
)
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.accounts import Caller, Tenant, check_there
from deltaserve.tenants.registry import Registry, Row

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
REFERENCE = re.compile(r"(?:([a-z0-9][a-z0-9._-]*):)?([A-Za-z0-9][A-Za-z0-9._-]*)(?:@([1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Version:
    """One version of a model: these bytes, for ever. `summary`: what the listing shows (codec, sizes, base)."""

    number: int
    digest: DeltaDigest
    created: int
    summary: dict[str, Any]


@dataclass(frozen=True)
class Canary:
    """A version that answers `percent` of the requests which name no version."""

    version: int
    percent: float


@dataclass(frozen=True)
class Model:
    """A name and where it points. `revision` grows with every change."""

    id: int
    tenant_id: int
    owner: str
    name: str
    active: Version
    canary: Canary | None
    pinned: bool
    revision: int
    created: int
    expires: int | None  # unix seconds; then it is deleted
    shared_with: tuple[str, ...]

    @property
    def is_over(self) -> bool:
        """Its time is up: nobody finds it, and `deltas.store` will soon delete it."""
        return self.expires is not None and self.expires <= time.time()

    @property
    def etag(self) -> str:
        return f'"{self.id}-{self.revision}"'

    @property
    def held(self) -> set[int]:
        """The versions that requests may be answered by without naming one."""
        return {self.active.number} | ({self.canary.version} if self.canary else set())

    def is_changed_by(self, caller: Caller) -> bool:
        return caller.reaches(self.tenant_id)

    def called_by(self, caller: Caller) -> str:
        """The id under which `caller` names it."""
        return caller.calls(self.tenant_id, self.owner, self.name)


@dataclass(frozen=True)
class Change:
    """What becomes of a model; None = as it is. `canary` with 0 percent: none. `expires` 0: never."""

    version: int | None = None
    canary: Canary | None = None
    pinned: bool | None = None
    expires: int | None = None
    shared_with: Sequence[Tenant] | None = None


@dataclass(frozen=True)
class Condition:
    """If-Match and If-None-Match of a request."""

    match: str | None = None
    none_match: str | None = None

    def check(self, model: Model | None) -> None:
        """Raises PreconditionFailed."""
        if self.match is not None and not _lists(self.match, model):
            state = f"its ETag is {model.etag}" if model else "there is none"
            raise PreconditionFailed(f"If-Match: {self.match[:200]} does not hold; {state}", param="If-Match")
        if self.none_match is not None and _lists(self.none_match, model):
            raise PreconditionFailed(f"If-None-Match: {self.none_match[:200]}: there is one", param="If-None-Match")


ALWAYS = Condition()


def _lists(header: str, model: Model | None) -> bool:
    return model is not None and (header.strip() == "*" or model.etag in [tag.strip() for tag in header.split(",")])


@dataclass(frozen=True)
class Reference:
    """What a request calls a model. `owner` None = the caller; `version` None = where the name points."""

    owner: str | None
    name: str
    version: int | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises ModelNotFound for what can be nobody's."""
        found = REFERENCE.fullmatch(text)
        if found is None or len(found[2]) > 128:
            raise missing(text)
        return cls(found[1], found[2], int(found[3]) if found[3] else None)


def missing(called: str) -> ModelNotFound:
    return ModelNotFound(f"The model `{called}` does not exist.", param="model")


def check_name(name: str) -> None:
    """Raises InvalidName."""
    if not NAME.fullmatch(name):
        raise InvalidName(
            f"{name[:200]!r} is no name: 1 to 128 of A–Z a–z 0–9 . _ - starting with a letter or digit", param="name"
        )


SELECT = """
SELECT m.id, m.tenant, t.name, m.name, m.canary, m.canary_percent, m.pinned, m.revision, m.created, m.expires,
       (SELECT group_concat(o.name, ',') FROM shares s JOIN tenants o ON o.id = s.tenant WHERE s.model = m.id),
       v.version, v.digest, v.created, v.summary
FROM models m JOIN tenants t ON t.id = m.tenant JOIN versions v ON v.model = m.id AND v.version = m.active
"""
IS_SEEN = "(m.tenant = ? OR EXISTS (SELECT 1 FROM shares s WHERE s.model = m.id AND s.tenant = ?))"  # one by name
BY_DIGEST = "SELECT model FROM versions WHERE digest = ?"
ALL_SEEN = "m.id IN (SELECT id FROM models WHERE tenant = ? UNION SELECT model FROM shares WHERE tenant = ?)"


class Models:
    """Rows only; the files are `deltas.store`'s. Thread-safe."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def visible(self, caller: Caller) -> list[Model]:
        """The caller's own by name, then what is shared with it; an admin sees all."""
        where, values = _by(caller, ALL_SEEN)
        order = "ORDER BY m.tenant != ?, t.name, m.name"
        rows = self._registry.rows(f"{SELECT} WHERE {where} {order}", *values, caller.tenant.id)
        return [model for row in rows if not (model := _model(row)).is_over]

    def of(self, tenant_id: int) -> list[Model]:
        return [_model(row) for row in self._registry.rows(f"{SELECT} WHERE m.tenant = ? ORDER BY m.name", tenant_id)]

    def every(self, limit: int) -> list[Model]:
        """Of all tenants, the oldest names first."""
        return [_model(row) for row in self._registry.rows(f"{SELECT} ORDER BY m.id LIMIT ?", limit)]

    def with_digest(self, digest: DeltaDigest) -> list[Model]:
        """Those of whose versions one is this file."""
        return [_model(row) for row in self._registry.rows(f"{SELECT} WHERE m.id IN ({BY_DIGEST})", digest)]

    def expired(self, now: float) -> list[Model]:
        return [_model(row) for row in self._registry.rows(f"{SELECT} WHERE m.expires <= ?", int(now))]

    def own(self, tenant_id: int, name: str) -> Model | None:
        rows = self._registry.rows(f"{SELECT} WHERE m.tenant = ? AND m.name = ?", tenant_id, name)
        return _model(rows[0]) if rows else None

    def living(self, tenant_id: int, name: str) -> Model | None:
        """`own`, unless its time is up."""
        return None if (model := self.own(tenant_id, name)) is None or model.is_over else model

    def find(self, caller: Caller, called: str) -> tuple[Model, Version | None]:
        """The model, and the version where the reference has one. Raises ModelNotFound."""
        wanted = Reference.parse(called)
        where, values = _by(caller, IS_SEEN)
        rows = self._registry.rows(
            f"{SELECT} WHERE t.name = ? AND m.name = ? AND {where}",
            wanted.owner or caller.tenant.name,
            wanted.name,
            *values,
        )
        if not rows or (model := _model(rows[0])).is_over:
            raise missing(called)
        return model, None if wanted.version is None else self.version(model, wanted.version, called)

    def owned(self, caller: Caller, called: str) -> tuple[Model, Version | None]:
        """`find`, for a change. Raises ModelNotFound, PermissionDenied for what is shared with the caller."""
        model, version = self.find(caller, called)
        if not model.is_changed_by(caller):
            raise PermissionDenied(f"{called} is shared with you; its owner alone can change it", param="model")
        return model, version

    def chosen(self, model: Model, draw: str) -> Version:
        """The version that answers a request: the canary for its share of draws, else where the name points. The same
        draw always falls on the same side."""
        if model.canary is not None:
            place = int.from_bytes(hashlib.sha256(f"{model.id}:{draw}".encode()).digest()[:8]) / 2**64
            if place * 100 < model.canary.percent:
                return self.version(model, model.canary.version)
        return model.active

    def versions(self, model: Model) -> list[Version]:
        """Newest first."""
        rows = self._registry.rows(
            "SELECT version, digest, created, summary FROM versions WHERE model = ? ORDER BY version DESC", model.id
        )
        return [_version(row) for row in rows]

    def version(self, model: Model, number: int, called: str | None = None) -> Version:
        """Raises ModelNotFound."""
        rows = self._registry.rows(
            "SELECT version, digest, created, summary FROM versions WHERE model = ? AND version = ?", model.id, number
        )
        if not rows:
            raise missing(called or f"{model.name}@{number}")
        return _version(rows[0])

    def is_named(self, digest: DeltaDigest) -> bool:
        return bool(self._registry.rows("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", digest))

    def add(self, tenant_id: int, name: str, digest: DeltaDigest, num_bytes: int, summary: dict[str, Any]) -> Version:
        """A new version, and the name if it is new; where the name pointed, it points still."""
        now = int(time.time())
        with self._registry.write() as db:
            check_there(db, tenant_id, "upload")
            db.execute(
                "INSERT INTO models (tenant, name, active, last_version, created) VALUES (?, ?, 1, 0, ?) "
                "ON CONFLICT DO NOTHING",
                (tenant_id, name, now),
            )
            ((model, number),) = db.execute(
                "UPDATE models SET last_version = last_version + 1, revision = revision + 1 "
                "WHERE tenant = ? AND name = ? RETURNING id, last_version",
                (tenant_id, name),
            ).fetchall()
            values = (model, number, digest, num_bytes, now, json.dumps(summary))
            db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", values)
        return Version(number, digest, now, summary)

    def point(self, model: Model, number: int) -> None:
        """The name points to this version from now on; a canary of the same version has become the name."""
        with self._registry.write() as db:
            db.execute(
                "UPDATE models SET active = ?, canary = NULLIF(canary, ?), revision = revision + 1 WHERE id = ?",
                (number, number, model.id),
            )

    def change(self, model: Model, change: Change) -> Model:
        """Raises ModelNotFound for a version that there is not."""
        with self._registry.write() as db:
            if change.version is not None:
                self.point(model, self.version(model, change.version).number)
            if change.canary is not None:
                number = self.version(model, change.canary.version).number if change.canary.percent else None
                db.execute(
                    "UPDATE models SET canary = ?, canary_percent = ? WHERE id = ?",
                    (number, change.canary.percent, model.id),
                )
            if change.pinned is not None:
                db.execute("UPDATE models SET pinned = ? WHERE id = ?", (int(change.pinned), model.id))
            if change.expires is not None:
                db.execute("UPDATE models SET expires = ? WHERE id = ?", (change.expires or None, model.id))
            if change.shared_with is not None:
                db.execute("DELETE FROM shares WHERE model = ?", (model.id,))
                for other in {tenant.id for tenant in change.shared_with} - {model.tenant_id}:
                    db.execute("INSERT INTO shares VALUES (?, ?)", (model.id, other))
            db.execute("UPDATE models SET revision = revision + 1 WHERE id = ?", (model.id,))
            return self.again(model)

    def again(self, model: Model) -> Model:
        """As it is now. Raises ModelNotFound."""
        found = self.own(model.tenant_id, model.name)
        if found is None:
            raise missing(model.name)
        return found

    def drop(self, model: Model, version: Version) -> None:
        """Forgets one version. Raises VersionInUse for one that the name or its canary points to."""
        if version.number in model.held:
            holder = model.name if version.number == model.active.number else f"the canary of {model.name}"
            raise VersionInUse(f"{holder} points to version {version.number}; move it first", param="version")
        with self._registry.write() as db:
            db.execute("DELETE FROM versions WHERE model = ? AND version = ?", (model.id, version.number))
            db.execute("UPDATE models SET revision = revision + 1 WHERE id = ?", (model.id,))

    def pinned(self) -> list[DeltaDigest]:
        """What pinned names point to."""
        return [_model(row).active.digest for row in self._registry.rows(f"{SELECT} WHERE m.pinned = 1")]

    def pinned_bytes(self, tenant_id: int) -> dict[DeltaDigest, int]:
        """What a tenant's pinned names point to, and its bytes on the device."""
        rows = self._registry.rows(f"{SELECT} WHERE m.tenant = ? AND m.pinned = 1", tenant_id)
        return {v.digest: v.summary["resident_bytes"] for v in (_model(row).active for row in rows)}

    def held_by(self, tenant_id: int) -> tuple[int, int]:
        """(models, bytes of their versions and of files that wait for a job); what two models share counts once."""
        sizes = """SELECT MAX(v.bytes) AS bytes FROM versions v JOIN models m ON m.id = v.model
            WHERE m.tenant = ? GROUP BY v.digest UNION ALL SELECT bytes FROM files WHERE tenant = ?"""
        ((count,),) = self._registry.rows("SELECT COUNT(*) FROM models WHERE tenant = ?", tenant_id)
        ((size,),) = self._registry.rows(
            f"SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM ({sizes}) AS sizes", tenant_id, tenant_id
        )
        return count, size

    def check_quota(self, tenant: Tenant) -> None:
        """Raises QuotaExceeded."""
        count, size = self.held_by(tenant.id)
        limits = tenant.limits
        if limits.max_models is not None and count > limits.max_models:
            raise QuotaExceeded(f"this would be model {count} of at most {limits.max_models}; delete one first")
        if limits.max_bytes is not None and size > limits.max_bytes:
            raise QuotaExceeded(
                f"with this upload {tenant.name} would hold {size} bytes of at most {limits.max_bytes}; delete a "
                "model, a version or a file first"
            )

    def prune(self, model: Model, keep: int) -> list[DeltaDigest]:
        """Forgets all but the newest `keep` versions, never those that the name or its canary points to; → what
        they pointed to."""
        gone = [version for version in self.versions(model)[keep:] if version.number not in model.held]
        with self._registry.write() as db:
            for version in gone:
                db.execute("DELETE FROM versions WHERE model = ? AND version = ?", (model.id, version.number))
        return [version.digest for version in gone]

    def forget(self, model: Model) -> list[DeltaDigest]:
        """Every version and the name; → what they pointed to, oldest first."""
        digests = [version.digest for version in reversed(self.versions(model))]
        with self._registry.write() as db:
            db.execute("DELETE FROM models WHERE id = ?", (model.id,))
        return digests


def _by(caller: Caller, condition: str) -> tuple[str, tuple[int, ...]]:
    """What an admin need not fulfil, and its values."""
    return ("TRUE", ()) if caller.is_admin else (condition, (caller.tenant.id, caller.tenant.id))


def _version(row: Row) -> Version:
    number, digest, created, summary = row
    return Version(number, DeltaDigest(digest), created, json.loads(summary))


def _model(row: Row) -> Model:
    model, tenant, owner, name, canary, percent, pinned, revision, created, expires, shared, *version = row
    return Model(
        id=model,
        tenant_id=tenant,
        owner=owner,
        name=name,
        active=_version(tuple(version)),
        canary=Canary(canary, percent) if canary is not None else None,
        pinned=bool(pinned),
        revision=revision,
        created=created,
        expires=expires,
        shared_with=tuple(sorted(shared.split(","))) if shared else (),
    )
