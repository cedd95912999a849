"""Jobs that compress: what is asked for, how far it is, what came of it. Rows only; the work: `deltas.compressions`.

    queued → running → succeeded | failed | cancelled       running → queued: its server stopped

A claim is an attempt, and its number is a fence: who runs an earlier one, on a server that was taken for dead, changes
nothing any more.
"""

from __future__ import annotations

import enum
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltaserve.errors import BadRequest, JobClosed, NotFound, RateLimited
from deltaserve.tenants.accounts import Caller, Tenant, check_there
from deltaserve.tenants.registry import Registry, Row

MAX_OPEN = 100  # jobs of one tenant that wait or run
MAX_ATTEMPTS = 3
MAX_EVENTS = 500  # of one job; those after it are not kept
MAX_MESSAGE_CHARS = 4000
SILENT_S = 30  # without a beat: its server is taken for dead
KEPT_S = 30 * 86400  # that a job can be asked for after its end


class JobStatus(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_open(self) -> bool:
        return self in (JobStatus.QUEUED, JobStatus.RUNNING)


@dataclass(frozen=True)
class Asked:
    """A request for a job."""

    name: str
    files: list[str]
    texts: dict[str, str]
    recipe: dict[str, Any]
    activates: bool

    @property
    def text(self) -> str:
        """The same for the same request."""
        return json.dumps(vars(self), sort_keys=True)


@dataclass(frozen=True)
class Job:
    """For the model `owner`:`name`. `asked`: {"files": ids of the checkpoint's, "texts": ids by what they are for,
    "recipe": fields of `deltas.recipe.Recipe`}. `progress`, `result`, `error`: what the API says of it."""

    number: int
    id: str
    tenant_id: int
    owner: str
    name: str
    by: str
    activates: bool
    asked: dict[str, Any]
    created: int
    started: int | None
    ended: int | None
    status: JobStatus
    attempts: int
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def files(self) -> list[str]:
        """Ids of all that it reads."""
        return [*self.asked["files"], *self.asked["texts"].values()]


@dataclass(frozen=True)
class JobEvent:
    number: int
    at: int
    level: str
    message: str


class Superseded(Exception):
    """The job was cancelled, or another attempt has it."""


SELECT = """
SELECT j.number, j.id, j.tenant, t.name, j.name, j.asked_by, j.activates, j.asked, j.created, j.started, j.ended,
       j.status, j.attempts, j.progress, j.result, j.error
FROM jobs j JOIN tenants t ON t.id = j.tenant
"""
NEXT = f"""{SELECT} WHERE j.status = 'queued' ORDER BY
    (SELECT COUNT(*) FROM jobs o WHERE o.tenant = j.tenant AND o.status = 'running'),
    (SELECT COALESCE(MAX(o.started), 0) FROM jobs o WHERE o.tenant = j.tenant), j.number LIMIT 1"""


class Jobs:
    """Thread-safe."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock

    def earlier(self, owner: Tenant, asked: Asked, key: str | None) -> Job | None:
        """The job that this request made when it came before. With a `key`, it is the request of that key; without,
        one for the same as a job that has not failed or been cancelled. Raises BadRequest for a key of another."""
        same = "request = ? AND status NOT IN ('failed', 'cancelled')" if key is None else "request_key = ?"
        found = self._registry.rows(
            f"SELECT id, request FROM jobs WHERE tenant = ? AND {same}", owner.id, asked.text if key is None else key
        )
        if found and found[0][1] != asked.text:
            raise BadRequest("this Idempotency-Key came with another request before", param="Idempotency-Key")
        return self._one(found[0][0]) if found else None

    def add(self, owner: Tenant, by: str, asked: Asked, key: str | None) -> Job:
        """A new job, or the `earlier` one. Raises BadRequest, RateLimited, NotFound."""
        job_id, now = f"compression-{secrets.token_hex(16)}", self._now()
        with self._registry.write() as db:
            check_there(db, owner.id, "job")
            if earlier := self.earlier(owner, asked, key):
                return earlier
            waiting = "SELECT COUNT(*) FROM jobs WHERE tenant = ? AND status IN ('queued', 'running')"
            if db.execute(waiting, (owner.id,)).fetchone()[0] >= MAX_OPEN:
                raise RateLimited(f"{MAX_OPEN} jobs wait or run; cancel one, or wait", retry_after_s=60)
            fields = {"files": asked.files, "texts": asked.texts, "recipe": asked.recipe}
            db.execute(
                "INSERT INTO jobs (id, tenant, name, asked_by, activates, asked, request, request_key, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (job_id, owner.id, asked.name, by, int(asked.activates), json.dumps(fields), asked.text, key, now),
            )
            job = self._one(job_id)
            for file in job.files:
                db.execute("INSERT INTO job_files VALUES (?, ?)", (job_id, file))
            self.log(job, "info", "queued")
            self._registry.audit(by, "job.create", f"{owner.name}:{asked.name}", job=job_id)
        return job

    def find(self, caller: Caller, job_id: str) -> Job:
        """Raises NotFound, in the same words for another tenant's."""
        job = self._one(job_id)
        if not caller.reaches(job.tenant_id):
            raise _missing(job_id)
        return job

    def again(self, job: Job) -> Job:
        """As it is now."""
        return self._one(job.id)

    def visible(self, caller: Caller, after: Job | None, limit: int) -> list[Job]:
        """The caller's, newest first, those older than `after`; an admin sees all."""
        rows = self._registry.rows(
            f"{SELECT} WHERE (j.tenant = ? OR ? = 1) AND j.number < ? ORDER BY j.number DESC LIMIT ?",
            caller.tenant.id,
            int(caller.is_admin),
            after.number if after else 2**62,
            limit,
        )
        return [_job(row) for row in rows]

    def open_of(self, tenant: Tenant) -> list[Job]:
        where = "WHERE j.tenant = ? AND j.status IN ('queued', 'running')"
        return [_job(row) for row in self._registry.rows(f"{SELECT} {where}", tenant.id)]

    def counts(self) -> dict[str, int]:
        """Of those that wait and run."""
        found: dict[str, int] = dict(
            self._registry.rows(
                "SELECT status, COUNT(*) FROM jobs WHERE status IN ('queued', 'running') GROUP BY status"
            )
        )
        return {status: found.get(status, 0) for status in (JobStatus.QUEUED, JobStatus.RUNNING)}

    def claim(self) -> Job | None:
        """The next one begins: of the tenant that has the fewest running, then was served longest ago."""
        if not self._registry.rows("SELECT 1 FROM jobs WHERE status = 'queued' LIMIT 1"):
            return None
        with self._registry.write() as db:
            rows = self._registry.rows(NEXT)
            if not rows:
                return None
            job = _job(rows[0])
            db.execute(
                "UPDATE jobs SET status = 'running', started = ?, beat = ?, attempts = attempts + 1, progress = NULL "
                "WHERE id = ?",
                (self._now(), self._now(), job.id),
            )
            job = self.again(job)
            self.log(job, "info", "started" if job.attempts == 1 else f"started again, attempt {job.attempts}")
        return job

    def beat(self, job: Job, progress: dict[str, Any] | None) -> None:
        """It is alive. Raises Superseded."""
        with self._registry.write() as db:
            self._fenced(
                db.execute(
                    "UPDATE jobs SET beat = ?, progress = ? WHERE id = ? AND status = 'running' AND attempts = ?",
                    (self._now(), json.dumps(progress) if progress else None, job.id, job.attempts),
                ).rowcount
            )

    def close(
        self, job: Job, status: JobStatus, *, result: dict[str, Any] | None = None, error: dict[str, Any] | None = None
    ) -> None:
        """It has ended. Raises Superseded."""
        with self._registry.write() as db:
            self._fenced(
                db.execute(
                    "UPDATE jobs SET status = ?, ended = ?, progress = NULL, result = ?, error = ? "
                    "WHERE id = ? AND status = 'running' AND attempts = ?",
                    (
                        status,
                        self._now(),
                        json.dumps(result) if result else None,
                        json.dumps(error) if error else None,
                        job.id,
                        job.attempts,
                    ),
                ).rowcount
            )
            self.log(job, "error" if error else "info", f"{status}: {error['message']}" if error else str(status))

    def _fenced(self, changed: int) -> None:
        if not changed:
            raise Superseded

    def put_back(self, job: Job) -> None:
        """Its server stops; the attempt does not count."""
        with self._registry.write() as db:
            db.execute(
                "UPDATE jobs SET status = 'queued', attempts = attempts - 1, progress = NULL "
                "WHERE id = ? AND status = 'running' AND attempts = ?",
                (job.id, job.attempts),
            )

    def take_back(self, silent_s: float = SILENT_S) -> list[Job]:
        """Jobs whose server is gone wait again; → those that have failed by it."""
        failed = []
        silent = f"{SELECT} WHERE j.status = 'running' AND j.beat <= ?"
        if not self._registry.rows(silent, self._now() - silent_s):
            return []
        with self._registry.write() as db:
            for job in [_job(row) for row in self._registry.rows(silent, self._now() - silent_s)]:
                if job.attempts >= MAX_ATTEMPTS:
                    message = f"the server stopped {MAX_ATTEMPTS} times while this job ran"
                    self.close(job, JobStatus.FAILED, error={"code": "job_failed", "message": message})
                    failed.append(job)
                else:
                    db.execute("UPDATE jobs SET status = 'queued', progress = NULL WHERE id = ?", (job.id,))
                    self.log(job, "warning", "its server stopped; it will start again")
        return failed

    def cancel(self, job: Job, by: str) -> Job:
        """May be called again. Raises JobClosed."""
        with self._registry.write() as db:
            job = self.again(job)
            if job.status.is_open:
                db.execute(
                    "UPDATE jobs SET status = 'cancelled', ended = ?, progress = NULL WHERE id = ?",
                    (self._now(), job.id),
                )
                self.log(job, "info", "cancelled")
                self._registry.audit(by, "job.cancel", f"{job.owner}:{job.name}", job=job.id)
            elif job.status is not JobStatus.CANCELLED:
                raise JobClosed(f"job {job.id} has {job.status}", param="compression_id")
        return self.again(job)

    def log(self, job: Job, level: str, message: str) -> None:
        """An event of a job, as long as it has not too many."""
        with self._registry.write() as db:
            ((last,),) = self._registry.rows("SELECT COALESCE(MAX(number), 0) FROM job_events WHERE job = ?", job.id)
            if last < MAX_EVENTS:
                values = (job.id, last + 1, self._now(), level, message[:MAX_MESSAGE_CHARS])
                db.execute("INSERT INTO job_events VALUES (?, ?, ?, ?, ?)", values)

    def events(self, job: Job, after: int = 0, limit: int = MAX_EVENTS) -> list[JobEvent]:
        """In their order."""
        rows = self._registry.rows(
            "SELECT number, at, level, message FROM job_events WHERE job = ? AND number > ? ORDER BY number LIMIT ?",
            job.id,
            after,
            limit,
        )
        return [JobEvent(*row) for row in rows]

    def forget_old(self) -> None:
        """Those that ended long ago."""
        old = "ended IS NOT NULL AND ended < ?"
        before = self._now() - KEPT_S
        if self._registry.rows(f"SELECT 1 FROM jobs WHERE {old} LIMIT 1", before):
            with self._registry.write() as db:
                db.execute(f"DELETE FROM jobs WHERE {old}", (before,))

    def _one(self, job_id: str) -> Job:
        rows = self._registry.rows(f"{SELECT} WHERE j.id = ?", job_id)
        if not rows:
            raise _missing(job_id)
        return _job(rows[0])

    def _now(self) -> int:
        return int(self._clock())


def _missing(job_id: str) -> NotFound:
    return NotFound(f"there is no compression {job_id[:200]!r}", param="compression_id")


def _job(row: Row) -> Job:
    number, key, tenant, owner, name, by, activates, asked, created, started, ended, status, attempts, *texts = row
    progress, result, error = (json.loads(text) if text else None for text in texts)
    return Job(
        number=number,
        id=key,
        tenant_id=tenant,
        owner=owner,
        name=name,
        by=by,
        activates=bool(activates),
        asked=json.loads(asked),
        created=created,
        started=started,
        ended=ended,
        status=JobStatus(status),
        attempts=attempts,
        progress=progress,
        result=result,
        error=error,
    )
