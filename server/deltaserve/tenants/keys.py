"""API keys: `ds-ID-SECRET`, of which the registry has the id and a SHA-256.

The secret has 256 random bits, so one round of SHA-256 is as good as a slow hash. A key is found by its id, which is no
secret, and compared in constant time; an unknown id is compared too, with a digest that nothing has.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from deltaserve.errors import AuthenticationFailed, BadRequest, NotFound
from deltaserve.tenants.accounts import Accounts, Caller, Scope, Tenant, is_there
from deltaserve.tenants.registry import Registry, Row

BOOTSTRAP = "bootstrap"  # key id of the server's --api-key
EVERYTHING = frozenset({Scope.ADMIN})
NOBODY = "-"  # key id of the callers of an open server
UNKNOWN = secrets.token_bytes(32)
MOST_KEYS = 100  # of one tenant that are neither revoked nor expired


@dataclass(frozen=True)
class Key:
    """One key, without its secret. Times are unix seconds; `expires` and `revoked` None = not."""

    id: str
    tenant: Tenant
    scopes: frozenset[Scope]
    label: str
    created: int
    expires: int | None
    revoked: int | None
    digest: bytes = field(repr=False)

    def is_valid(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


class Keys:
    """Every key, in memory and in the registry; a change counts from the next request on. Thread-safe.

    A registry that has never had a key, with no `bootstrap` key, is open: every caller is the default tenant's admin.
    That is decided once: revoking the last key does not open a server.
    """

    def __init__(
        self,
        registry: Registry,
        accounts: Accounts,
        bootstrap: str | None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._accounts = accounts
        self._clock = clock
        self._changing = threading.Lock()
        self.is_open = bootstrap is None
        self._seen = -1
        self._load()
        self._bootstrap_digest = _digest(bootstrap) if bootstrap is not None else UNKNOWN

    @property
    def may_be_stale(self) -> bool:
        """Is `refresh` to be called before `authenticate`?"""
        return self._registry.is_shared

    def refresh(self) -> None:
        """Hears of what other servers changed, keys and tenants. Raises RegistryUnavailable."""
        change = self._registry.last_change()
        if change != self._seen:
            self._accounts.reload()
            self.reload()
            self._seen = change

    def authenticate(self, given: str | None) -> Caller:
        """Whose key that is. Raises AuthenticationFailed, the same for every reason."""
        if self.is_open:
            return Caller(self._accounts.default, NOBODY, EVERYTHING)
        digest = _digest(given or "")
        key = self._keys.get((given or "")[3:19])
        is_bootstrap = secrets.compare_digest(digest, self._bootstrap_digest)
        is_key = secrets.compare_digest(digest, key.digest if key else UNKNOWN)
        if is_bootstrap:
            return Caller(self._accounts.default, BOOTSTRAP, EVERYTHING)
        tenant = self._accounts.get(key.tenant.id) if key else None  # with the limits of now
        if key is None or tenant is None or not is_key or not key.is_valid(self._clock()):
            raise AuthenticationFailed("a valid key is needed: Authorization: Bearer KEY")
        return Caller(tenant, key.id, key.scopes)

    def all(self, tenant: Tenant | None = None) -> list[Key]:
        """By tenant and age; revoked and expired ones too."""
        return [key for key in self._keys.values() if tenant is None or key.tenant.id == tenant.id]

    def get(self, key_id: str) -> Key:
        """Raises NotFound."""
        key = self._keys.get(key_id)
        if key is None:
            raise NotFound(f"there is no key {key_id[:64]!r}", param="key")
        return key

    def create(
        self, tenant: Tenant, scopes: Collection[Scope], by: str, *, label: str = "", expires_in_s: int | None = None
    ) -> tuple[Key, str]:
        """(the key, its text, which is told this once). Raises BadRequest, NotFound, StorageFull."""
        if self.is_open:
            raise BadRequest("this server was started without a key; start it with --api-key, then create others")
        now = int(self._clock())
        if sum(key.is_valid(now) for key in self.all(tenant)) >= MOST_KEYS:
            raise BadRequest(f"{tenant.name} has {MOST_KEYS} keys, the most there may be; revoke one", param="tenant")
        key_id = secrets.token_hex(8)
        text = f"ds-{key_id}-{secrets.token_urlsafe(32)}"
        expires = None if expires_in_s is None else now + expires_in_s
        key = Key(key_id, tenant, frozenset(scopes), label, now, expires, None, _digest(text))
        with self._changing:
            with self._registry.write() as db:
                if not is_there(db, tenant.id):
                    raise NotFound(f"there is no tenant {tenant.name!r}", param="tenant")
                db.execute(
                    "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                    (key_id, tenant.id, key.digest, " ".join(sorted(scopes)), label, now, expires),
                )
                self._registry.audit(by, "key.create", f"{tenant.name}/{key_id}", scopes=sorted(scopes))
            self._load()
        return key, text

    def rotate(self, key: Key, by: str, *, grace_s: int = 0) -> tuple[Key, str]:
        """A new key in the place of `key`, which ends after `grace_s` seconds. Raises BadRequest for one that has
        ended already."""
        now = int(self._clock())
        if not key.is_valid(now):
            raise BadRequest(f"key {key.id} is revoked or has expired", param="key")
        lifetime = None if key.expires is None else key.expires - key.created
        made = self.create(key.tenant, key.scopes, by, label=key.label, expires_in_s=lifetime)
        ends = min(now + grace_s, key.expires or now + grace_s)
        self._end(key, "expires", ends, by, "key.rotate", replaced_by=made[0].id)
        return made

    def revoke(self, key: Key, by: str) -> Key:
        """Counts from the next request on. Raises StorageFull."""
        if key.revoked is None:
            self._end(key, "revoked", int(self._clock()), by, "key.revoke")
        return self.get(key.id)

    def reload(self) -> None:
        """After keys were changed elsewhere: a deleted tenant's, or by another server."""
        with self._changing:
            self._load()

    def _end(self, key: Key, column: str, when: int, by: str, action: str, **detail: str) -> None:
        with self._changing:
            with self._registry.write() as db:
                db.execute(f"UPDATE keys SET {column} = ? WHERE id = ?", (when, key.id))
                self._registry.audit(by, action, f"{key.tenant.name}/{key.id}", **detail)
            self._load()

    def _load(self) -> None:
        rows = self._registry.rows(
            "SELECT id, tenant, scopes, label, created, expires, revoked, digest FROM keys ORDER BY tenant, created, id"
        )
        self._keys = {row[0]: key for row in rows if (key := self._key(row)) is not None}
        self.is_open = self.is_open and not self._keys

    def _key(self, row: Row) -> Key | None:
        key_id, tenant_id, scopes, label, created, expires, revoked, digest = row
        tenant = self._accounts.get(tenant_id)
        if tenant is None:  # being deleted
            return None
        return Key(key_id, tenant, frozenset(map(Scope, scopes.split())), label, created, expires, revoked, digest)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
