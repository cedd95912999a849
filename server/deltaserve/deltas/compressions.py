"""Compressing what tenants upload: jobs of the registry, each run by a worker process of its own.

1. `create` lays the files out, checks every name, shape and type against the base, and the recipe; then writes the row.
2. A thread (`deltas.job_runner`) claims the next job, of the tenant that was served longest ago, and starts a worker
   (`deltas.worker_process`, `deltaserve.worker`).
3. What the worker tells becomes progress and events; a cancel, or a claim by another server, kills it.
4. Its artifact goes the way of every upload (`deltas.intake`); the version and the job's end are one transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deltaserve.deltas.adapters import is_adapter
from deltaserve.deltas.adapters.parts import ADAPTER_CONFIG
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import chat_template
from deltaserve.deltas.compress import check_pair
from deltaserve.deltas.job_runner import JobRunner
from deltaserve.deltas.recipe import Recipe
from deltaserve.deltas.staging import Staging
from deltaserve.errors import CheckpointError, PermissionDenied
from deltaserve.tenants.accounts import Caller, Tenant
from deltaserve.tenants.jobs import Asked, Job, Jobs
from deltaserve.tenants.registry import Registry


class Compressions:
    """Thread-safe. `check_template` raises TemplateError."""

    def __init__(
        self,
        registry: Registry,
        jobs: Jobs,
        staging: Staging,
        base: Checkpoint,
        check_template: Callable[[str], None],
        runner: JobRunner,
    ) -> None:
        self._registry = registry
        self.jobs = jobs
        self._staging = staging
        self._base = base
        self._check_template = check_template
        self._runner = runner

    def create(self, caller: Caller, owner: Tenant, asked: Asked, key: str | None) -> Job:
        """A new job, or the one that this request has made before. Raises PermissionDenied where the server runs no
        jobs, NotFound for files, CheckpointError for files that are no fine-tune of the base, CodecError, BadRequest,
        RateLimited, StorageFull."""
        if not self._runner.is_working:
            raise PermissionDenied("this server compresses nothing (--jobs 0): upload an artifact instead")
        if earlier := self.jobs.earlier(owner, asked, key):  # its files may be gone
            return earlier
        Recipe(**asked.recipe).make_codec()
        for file in asked.texts.values():
            self._staging.rows.find(caller, file)
        files = [self._staging.rows.find(caller, file) for file in asked.files]
        with self._staging.scratch() as scratch, self._staging.laid_out(files, scratch / asked.name) as folder:
            self._check(folder)
        job = self.jobs.add(owner, str(caller), asked, key)
        self._runner.wake()
        return job

    def _check(self, folder: Path) -> None:
        """What can be told without reading a tensor."""
        try:
            checkpoint = Checkpoint.open(folder)
            if is_adapter(folder):
                checkpoint.json(ADAPTER_CONFIG)
            else:
                check_pair(self._base, checkpoint)
            template = chat_template(folder)
        except (CheckpointError, ValueError, TypeError, KeyError) as error:
            message = getattr(error, "message", f"its chat template cannot be read: {error}")
            raise CheckpointError(message.replace(f"{folder}/", "").replace(str(folder), folder.name)) from None
        if template is not None:
            self._check_template(template)

    def cancel(self, caller: Caller, job_id: str) -> Job:
        """Its worker is killed, its files go. May be called again. Raises NotFound, JobClosed."""
        return self._cancelled(self.jobs.find(caller, job_id), str(caller))

    def cancel_all(self, tenant: Tenant, by: str) -> None:
        for job in self.jobs.open_of(tenant):
            self._cancelled(job, by)

    def _cancelled(self, job: Job, by: str) -> Job:
        with self._registry.write():
            job = self.jobs.cancel(job, by)
            gone = self._staging.forget(job)
        self._runner.kill(job)
        self._staging.drop(gone)
        return job

    def sweep(self) -> None:
        """Called every now and then."""
        self._staging.sweep()
        self.jobs.forget_old()

    def close(self) -> None:
        self._runner.close()
