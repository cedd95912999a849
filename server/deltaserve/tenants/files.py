"""Uploaded files that wait for a job: what a checkpoint consists of. Rows only; the bytes: `deltas.staging`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaserve.errors import FileInUse, NotFound, QuotaExceeded
from deltaserve.tenants.accounts import Caller, Tenant, check_there
from deltaserve.tenants.registry import Registry

FOR_A_JOB = "user_data"  # the purpose of such a file, in OpenAI's words
MAX_FILES = 1000  # of one tenant
IS_USED = """EXISTS (SELECT 1 FROM job_files u JOIN jobs j ON j.id = u.job
    WHERE u.file = f.id AND j.status IN ('queued', 'running'))"""


@dataclass(frozen=True)
class StagedFile:
    id: str
    tenant_id: int
    filename: str
    purpose: str
    num_bytes: int
    sha256: str
    created: int
    expires: int


class StagedFiles:
    """Thread-safe. `expires_s`: how long a file waits for a job."""

    def __init__(self, registry: Registry, expires_s: int, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._expires_s = expires_s
        self._clock = clock

    def new(self, owner: Tenant, filename: str, purpose: str, num_bytes: int, sha256: str) -> StagedFile:
        """One that is not there yet."""
        file_id, now = f"file-{secrets.token_hex(16)}", int(self._clock())
        return StagedFile(file_id, owner.id, filename, purpose, num_bytes, sha256, now, now + self._expires_s)

    def add(self, file: StagedFile, owner: Tenant) -> None:
        """Raises NotFound for a tenant that was deleted, QuotaExceeded for one that has too many."""
        with self._registry.write() as db:
            check_there(db, owner.id, "file")
            if db.execute("SELECT COUNT(*) FROM files WHERE tenant = ?", (owner.id,)).fetchone()[0] >= MAX_FILES:
                raise QuotaExceeded(f"{owner.name} has {MAX_FILES} files; delete some first")
            db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)", tuple(vars(file).values()))

    def find(self, caller: Caller, file_id: str) -> StagedFile:
        """Raises NotFound, in the same words for another tenant's."""
        found = self._where("f.id = ?", file_id)
        if not found or not caller.reaches(found[0].tenant_id):
            raise _missing(file_id)
        return found[0]

    def of(self, tenant: Tenant) -> list[StagedFile]:
        """Newest first."""
        return self._where("f.tenant = ? ORDER BY f.created DESC, f.id", tenant.id)

    def of_job(self, job_id: str) -> list[StagedFile]:
        return self._where("f.id IN (SELECT file FROM job_files WHERE job = ?)", job_id)

    def all(self) -> list[StagedFile]:
        return self._where("TRUE")

    def expired(self) -> list[StagedFile]:
        """Those that no job waits for."""
        return self._where(f"f.expires <= ? AND NOT {IS_USED}", int(self._clock()))

    def remove(self, file: StagedFile) -> None:
        """Raises FileInUse, NotFound."""
        with self._registry.write() as db:
            if self._where(f"f.id = ? AND {IS_USED}", file.id):
                raise FileInUse(f"a job is to read {file.id}; cancel it first", param="file_id")
            if not db.execute("DELETE FROM files WHERE id = ?", (file.id,)).rowcount:
                raise _missing(file.id)

    def renew(self, files: Sequence[StagedFile]) -> None:
        with self._registry.write() as db:
            for file in files:
                values = (int(self._clock()) + self._expires_s, file.id)
                db.execute("UPDATE files SET expires = ? WHERE id = ?", values)

    def _where(self, condition: str, *values: object) -> list[StagedFile]:
        columns = "f.id, f.tenant, f.filename, f.purpose, f.bytes, f.digest, f.created, f.expires"
        return [
            StagedFile(*row) for row in self._registry.rows(f"SELECT {columns} FROM files f WHERE {condition}", *values)
        ]


def _missing(file_id: str) -> NotFound:
    return NotFound(f"there is no file {file_id[:200]!r}", param="file_id")
