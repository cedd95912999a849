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
from dataclasses import dataclass
from typing import Any

from deltaserve.errors import InvalidName, ModelNotFound, NotFound, PermissionDenied
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.accounts import Caller
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
    shared_with: tuple[str, ...]

    @property
    def etag(self) -> str:
        return f'"{self.id}-{self.revision}"'

    def called_by(self, caller: Caller) -> str:
        """The id under which `caller` names it."""
        return self.name if self.tenant_id == caller.tenant.id else f"{self.owner}:{self.name}"


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
SELECT m.id, m.tenant, t.name, m.name, m.canary, m.canary_percent, m.pinned, m.revision, m.created,
       (SELECT json_group_array(o.name) FROM shares s JOIN tenants o ON o.id = s.tenant WHERE s.model = m.id),
       v.version, v.digest, v.created, v.summary
FROM models m JOIN tenants t ON t.id = m.tenant JOIN versions v ON v.model = m.id AND v.version = m.active
"""
VISIBLE = "(? OR m.tenant = ? OR EXISTS (SELECT 1 FROM shares s WHERE s.model = m.id AND s.tenant = ?))"


class Models:
    """Rows only; the files are `deltas.store`'s. Thread-safe."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def visible(self, caller: Caller) -> list[Model]:
        """The caller's own by name, then what is shared with it; an admin sees all."""
        me = caller.tenant.id
        order = "ORDER BY m.tenant != ?, t.name, m.name"
        return [_model(row) for row in self._registry.rows(f"{SELECT} WHERE {VISIBLE} {order}", *_sees(caller), me)]

    def of(self, tenant_id: int) -> list[Model]:
        return [_model(row) for row in self._registry.rows(f"{SELECT} WHERE m.tenant = ? ORDER BY m.name", tenant_id)]

    def every(self, limit: int) -> list[Model]:
        """Of all tenants, the oldest names first."""
        return [_model(row) for row in self._registry.rows(f"{SELECT} ORDER BY m.id LIMIT ?", limit)]

    def own(self, tenant_id: int, name: str) -> Model | None:
        rows = self._registry.rows(f"{SELECT} WHERE m.tenant = ? AND m.name = ?", tenant_id, name)
        return _model(rows[0]) if rows else None

    def find(self, caller: Caller, called: str) -> tuple[Model, Version | None]:
        """The model, and the version where the reference has one. Raises ModelNotFound."""
        wanted = Reference.parse(called)
        rows = self._registry.rows(
            f"{SELECT} WHERE t.name = ? AND m.name = ? AND {VISIBLE}",
            wanted.owner or caller.tenant.name,
            wanted.name,
            *_sees(caller),
        )
        if not rows:
            raise missing(called)
        model = _model(rows[0])
        return model, None if wanted.version is None else self.version(model, wanted.version, called)

    def owned(self, caller: Caller, called: str) -> tuple[Model, Version | None]:
        """`find`, for a change. Raises ModelNotFound, PermissionDenied for what is shared with the caller."""
        model, version = self.find(caller, called)
        if model.tenant_id != caller.tenant.id and not caller.is_admin:
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
            if not db.execute("SELECT 1 FROM tenants WHERE id = ?", (tenant_id,)).fetchone():
                raise NotFound("the tenant of this upload was deleted", param="tenant")
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

    def prune(self, model: Model, keep: int) -> list[DeltaDigest]:
        """Forgets all but the newest `keep` versions, never those that the name or its canary points to; → what
        they pointed to."""
        held = {model.active.number, model.canary.version if model.canary else model.active.number}
        gone = [version for version in self.versions(model)[keep:] if version.number not in held]
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


def _sees(caller: Caller) -> tuple[bool, int, int]:
    return caller.is_admin, caller.tenant.id, caller.tenant.id


def _version(row: Row) -> Version:
    number, digest, created, summary = row
    return Version(number, DeltaDigest(digest), created, json.loads(summary))


def _model(row: Row) -> Model:
    model, tenant, owner, name, canary, percent, pinned, revision, created, shared, *version = row
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
        shared_with=tuple(sorted(json.loads(shared))),
    )
