"""Uploads in parts: what was declared, which parts are here, what became of it. Rows only; the files: `deltas.parts`.

A part is called by its SHA-256. So a part that is sent again is the part that is here, and who resumes can tell from
the list what is missing.
"""

from __future__ import annotations

import enum
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltaserve.errors import BadRequest, NotFound, RateLimited, UploadClosed
from deltaserve.tenants.accounts import Caller, Tenant, check_there
from deltaserve.tenants.registry import Registry, Row

MAX_PENDING = 100  # uploads of one tenant
MAX_PARTS = 10_000  # of one upload
KEPT_S = 7 * 86400  # that an upload can be asked for after its end


class Status(enum.StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Part:
    sha256: str
    num_bytes: int
    created: int

    @property
    def id(self) -> str:
        return f"part_{self.sha256}"


@dataclass(frozen=True)
class PartedUpload:
    """For the model `owner`:`name`, or with no name a file for a job. `result`: what a completed one became (version
    or file, sha256, md5, created)."""

    id: str
    tenant_id: int
    owner: str
    name: str
    filename: str
    purpose: str
    num_bytes: int
    activates: bool
    created: int
    expires: int
    status: Status
    result: dict[str, Any] | None

    def check_pending(self) -> None:
        """Raises UploadClosed."""
        if self.status is not Status.PENDING:
            raise UploadClosed(f"upload {self.id} is {self.status}; begin another", param="upload_id")


SELECT = """
SELECT u.id, u.tenant, t.name, u.name, u.filename, u.purpose, u.bytes, u.activates, u.created, u.expires, u.status,
       u.result
FROM uploads u JOIN tenants t ON t.id = u.tenant
"""


class PartedUploads:
    """Thread-safe. `expires_s`: how long an upload waits for its next part."""

    def __init__(self, registry: Registry, expires_s: int, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._expires_s = expires_s
        self._clock = clock

    def add(
        self, owner: Tenant, name: str, *, filename: str, purpose: str, num_bytes: int, activates: bool
    ) -> PartedUpload:
        """Raises RateLimited, NotFound for a tenant that was deleted."""
        upload_id, now = f"upload_{secrets.token_hex(16)}", int(self._clock())
        with self._registry.write() as db:
            check_there(db, owner.id, "upload")
            pending = "SELECT COUNT(*) FROM uploads WHERE tenant = ? AND status = 'pending' AND expires > ?"
            if db.execute(pending, (owner.id, now)).fetchone()[0] >= MAX_PENDING:
                raise RateLimited(f"{MAX_PENDING} uploads are pending; complete or cancel one first", retry_after_s=60)
            values = (
                upload_id,
                owner.id,
                name,
                filename,
                purpose,
                num_bytes,
                int(activates),
                now,
                now + self._expires_s,
            )
            db.execute(
                "INSERT INTO uploads (id, tenant, name, filename, purpose, bytes, activates, created, expires) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        return self._one(upload_id)

    def find(self, caller: Caller, upload_id: str) -> PartedUpload:
        """Raises NotFound, in the same words for another tenant's."""
        upload = self._one(upload_id)
        if not caller.reaches(upload.tenant_id):
            raise _missing(upload_id)
        return upload

    def again(self, upload: PartedUpload) -> PartedUpload:
        """As it is now."""
        return self._one(upload.id)

    def all_pending(self) -> list[PartedUpload]:
        """With those that have expired and still have their parts."""
        return [self._upload(row) for row in self._registry.rows(f"{SELECT} WHERE u.status = 'pending'")]

    def parts(self, upload: PartedUpload) -> list[Part]:
        """In the order in which they came."""
        rows = self._registry.rows(
            "SELECT digest, bytes, created FROM upload_parts WHERE upload = ? ORDER BY place", upload.id
        )
        return [Part(*row) for row in rows]

    def add_part(self, upload: PartedUpload, sha256: str, num_bytes: int) -> Part:
        """A part that is here already is that part; any renews the upload. Raises UploadClosed, BadRequest for more
        than was declared."""
        now = int(self._clock())
        with self._registry.write() as db:
            self.again(upload).check_pending()
            before = self.parts(upload)
            part = next((part for part in before if part.sha256 == sha256), None)
            if part is None:
                if sum(part.num_bytes for part in before) + num_bytes > upload.num_bytes:
                    raise BadRequest(
                        f"with this part there would be more than the {upload.num_bytes} bytes declared; "
                        f"GET /v1/uploads/{upload.id} lists the parts that are here",
                        param="data",
                    )
                if len(before) >= MAX_PARTS:
                    raise BadRequest(f"an upload has at most {MAX_PARTS} parts", param="data")
                part = Part(sha256, num_bytes, now)
                db.execute(
                    "INSERT INTO upload_parts VALUES (?, ?, ?, ?, ?)", (upload.id, sha256, num_bytes, now, len(before))
                )
            db.execute("UPDATE uploads SET expires = ? WHERE id = ?", (now + self._expires_s, upload.id))
        return part

    def close(self, upload: PartedUpload, status: Status, **result: Any) -> list[Part]:
        """It has ended, and has no parts any more; → those it had."""
        with self._registry.write() as db:
            parts = self.parts(upload)
            db.execute("DELETE FROM upload_parts WHERE upload = ?", (upload.id,))
            db.execute(
                "UPDATE uploads SET status = ?, expires = ?, result = ? WHERE id = ?",
                (status, int(self._clock()), json.dumps(result) if result else None, upload.id),
            )
        return parts

    def has_ended(self, upload: PartedUpload) -> bool:
        return not self._registry.rows("SELECT 1 FROM uploads WHERE id = ? AND status = 'pending'", upload.id)

    def forget_old(self) -> None:
        """Those that ended long ago."""
        before = int(self._clock()) - KEPT_S
        if self._registry.rows("SELECT 1 FROM uploads WHERE status != 'pending' AND expires < ? LIMIT 1", before):
            with self._registry.write() as db:
                db.execute("DELETE FROM uploads WHERE status != 'pending' AND expires < ?", (before,))

    def _one(self, upload_id: str) -> PartedUpload:
        rows = self._registry.rows(f"{SELECT} WHERE u.id = ?", upload_id)
        if not rows:
            raise _missing(upload_id)
        return self._upload(rows[0])

    def _upload(self, row: Row) -> PartedUpload:
        key, tenant, owner, name, filename, purpose, num_bytes, activates, created, expires, status, result = row
        if status == Status.PENDING and expires <= self._clock():
            status = Status.EXPIRED
        return PartedUpload(
            id=key,
            tenant_id=tenant,
            owner=owner,
            name=name,
            filename=filename,
            purpose=purpose,
            num_bytes=num_bytes,
            activates=bool(activates),
            created=created,
            expires=expires,
            status=Status(status),
            result=json.loads(result) if result else None,
        )


def _missing(upload_id: str) -> NotFound:
    return NotFound(f"there is no upload {upload_id[:200]!r}", param="upload_id")
