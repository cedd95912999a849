"""Tenants: the accounts that own models and keys; and the caller, who a request comes from."""

from __future__ import annotations

import enum
import json
import re
import threading
import time
from dataclasses import dataclass

from deltaserve.errors import InvalidName, NameConflict, NotFound
from deltaserve.tenants.limits import UNLIMITED, Limits
from deltaserve.tenants.migrations import DEFAULT_TENANT
from deltaserve.tenants.registry import Registry, Transaction

TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class Scope(enum.StrEnum):
    """What a key may do. `admin` may everything, for every tenant."""

    INFERENCE = "inference"  # ask models
    MANAGE = "manage"  # upload, change and delete the tenant's models
    METRICS = "metrics"  # read /metrics, which names every tenant
    ADMIN = "admin"


@dataclass(frozen=True)
class Tenant:
    """Neither `id` nor `name` is ever given again: what carries them (usage, the log, caches) stays whose it was."""

    id: int
    name: str
    created: int
    limits: Limits = UNLIMITED


@dataclass(frozen=True)
class Caller:
    """Who a request comes from."""

    tenant: Tenant
    key_id: str
    scopes: frozenset[Scope]

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    def may(self, *any_of: Scope) -> bool:
        return self.is_admin or not self.scopes.isdisjoint(any_of)

    def reaches(self, tenant_id: int) -> bool:
        """Is what this tenant owns the caller's to see and change?"""
        return self.is_admin or tenant_id == self.tenant.id

    def calls(self, tenant_id: int, owner: str, name: str) -> str:
        """The id under which the caller names a tenant's model."""
        return name if tenant_id == self.tenant.id else f"{owner}:{name}"

    def __str__(self) -> str:
        return f"{self.tenant.name}/{self.key_id}"


class Accounts:
    """Every tenant, in memory and in the registry. Thread-safe."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._changing = threading.Lock()  # what is in memory follows the registry, in its order
        self._load()

    def reload(self) -> None:
        """What other servers changed."""
        with self._changing:
            self._load()

    def _load(self) -> None:
        rows = self._registry.rows("SELECT id, name, created, limits FROM tenants WHERE deleted IS NULL ORDER BY name")
        self._tenants = {key: Tenant(key, name, made, Limits(**json.loads(bounds))) for key, name, made, bounds in rows}

    @property
    def default(self) -> Tenant:
        return self._tenants[DEFAULT_TENANT]

    def all(self) -> list[Tenant]:
        return list(self._tenants.values())

    def get(self, tenant_id: int) -> Tenant | None:
        return self._tenants.get(tenant_id)

    def owner(self, tenant_id: int, of: str) -> Tenant:
        """Whose an upload, a file or a job (`of`) is. Raises NotFound where that was deleted since."""
        if (tenant := self.get(tenant_id)) is None:
            raise _deleted(of)
        return tenant

    def named(self, name: str) -> Tenant:
        """Raises NotFound."""
        for tenant in self._tenants.values():
            if tenant.name == name:
                return tenant
        raise _missing(name)

    def create(self, name: str, by: str, limits: Limits = UNLIMITED) -> Tenant:
        """Raises InvalidName, NameConflict, StorageFull."""
        if not TENANT_NAME.fullmatch(name):
            raise InvalidName(
                f"{name[:200]!r} is no tenant: 1 to 63 of a–z 0–9 . _ - starting with a letter or digit", param="name"
            )
        with self._changing:
            with self._registry.write() as db:
                if db.execute("SELECT 1 FROM tenants WHERE name = ?", (name,)).fetchone():
                    raise NameConflict(f"{name!r} is or was a tenant; names are not given again", param="name")
                values = (name, int(time.time()), json.dumps(limits.given()))
                db.execute("INSERT INTO tenants (name, created, limits) VALUES (?, ?, ?)", values)
                self._registry.audit(by, "tenant.create", name, **limits.given())
            self._load()
        return self.named(name)

    def limit(self, tenant: Tenant, changes: dict[str, int | None], by: str) -> Tenant:
        """New bounds, from the next request on; None lifts one. Raises NotFound, StorageFull."""
        with self._changing:
            with self._registry.write() as db:
                found = db.execute(
                    "SELECT limits FROM tenants WHERE id = ? AND deleted IS NULL", (tenant.id,)
                ).fetchone()
                if found is None:
                    raise _missing(tenant.name)
                limits = Limits(**json.loads(found[0])).with_changes(changes)
                db.execute("UPDATE tenants SET limits = ? WHERE id = ?", (json.dumps(limits.given()), tenant.id))
                self._registry.audit(by, "tenant.limit", tenant.name, **changes)
            self._load()
        return self._tenants[tenant.id]

    def check_deletable(self, tenant: Tenant) -> None:
        """Raises NameConflict for the default tenant."""
        if tenant.id == DEFAULT_TENANT:
            raise NameConflict(f"{tenant.name!r} is the server's own tenant and stays", param="tenant")

    def delete(self, tenant: Tenant, by: str) -> None:
        """The tenant and its keys. Raises NameConflict for the default tenant and for one that has models."""
        self.check_deletable(tenant)
        with self._changing:
            with self._registry.write() as db:
                if db.execute("SELECT 1 FROM models WHERE tenant = ? LIMIT 1", (tenant.id,)).fetchone():
                    raise NameConflict(
                        f"{tenant.name!r} has models; an upload of it may just have ended", param="tenant"
                    )
                for table in ("keys", "shares"):
                    db.execute(f"DELETE FROM {table} WHERE tenant = ?", (tenant.id,))
                db.execute("UPDATE tenants SET deleted = ? WHERE id = ?", (int(time.time()), tenant.id))
                self._registry.audit(by, "tenant.delete", tenant.name)
            self._load()


def is_there(db: Transaction, tenant_id: int) -> bool:
    return bool(db.execute("SELECT 1 FROM tenants WHERE id = ? AND deleted IS NULL", (tenant_id,)).fetchone())


def check_there(db: Transaction, tenant_id: int, of: str) -> None:
    """In the transaction that gives a tenant an upload, a file or a job (`of`). Raises NotFound."""
    if not is_there(db, tenant_id):
        raise _deleted(of)


def _deleted(of: str) -> NotFound:
    return NotFound(f"the tenant of this {of} was deleted", param="tenant")


def _missing(name: str) -> NotFound:
    return NotFound(f"there is no tenant {name[:64]!r}", param="tenant")
