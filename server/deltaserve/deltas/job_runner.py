"""The threads that run jobs (`deltas.compressions`): claim, lay out, have a worker compress, publish.

A server that stops puts its jobs back; one that was killed has its jobs started again, up to MAX_ATTEMPTS. A worker
that dies fails its job, and the server lives.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.files import pieces
from deltaserve.deltas.intake import Intake
from deltaserve.deltas.order import Order
from deltaserve.deltas.staging import Staging
from deltaserve.deltas.store import Destination, Stored
from deltaserve.deltas.worker_process import WorkerProcess
from deltaserve.errors import DeltaServeError, NotFound
from deltaserve.tenants.accounts import Accounts
from deltaserve.tenants.files import StagedFile
from deltaserve.tenants.jobs import SILENT_S, Job, Jobs, JobStatus, Superseded

logger = logging.getLogger(__name__)
BEAT_S = 2.0  # between rows that say how far it is
LOOK_S = 5.0  # between looks for jobs that another server has queued, or left behind


@dataclass(frozen=True)
class Bounds:
    """`workers`: jobs at once, 0 = none. `threads`, `memory_bytes`: of a worker; None = no bound but the machine's."""

    workers: int
    threads: int
    memory_bytes: int | None
    timeout_s: int


class JobRunner:
    """`start` it once, `wake` it for a new job. `on_published` is called after each new version."""

    def __init__(
        self,
        jobs: Jobs,
        accounts: Accounts,
        staging: Staging,
        intake: Intake,
        base: Checkpoint,
        bounds: Bounds,
        on_published: Callable[[], None],
    ) -> None:
        self._jobs = jobs
        self._accounts = accounts
        self._staging = staging
        self._intake = intake
        self._base = base
        self._bounds = bounds
        self._on_published = on_published
        self._workers: dict[str, WorkerProcess] = {}  # by job
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"job-{number}", daemon=True) for number in range(bounds.workers)
        ]

    def start(self, *, is_alone: bool) -> None:
        """Work begins. Alone, with no other server on this registry, what is said to run was left behind."""
        self._jobs.take_back(0 if is_alone else SILENT_S)
        for thread in self._threads:
            thread.start()

    @property
    def is_working(self) -> bool:
        return bool(self._threads)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def kill(self, job: Job) -> None:
        """Ends its worker, where it is here."""
        with self._changed:
            if worker := self._workers.get(job.id):
                worker.kill()

    def close(self) -> None:
        """What runs waits for the next server."""
        with self._changed:
            self._is_closed = True
            for worker in self._workers.values():
                worker.kill()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        while True:
            try:
                job = None if self._is_closed else self._jobs.claim()
                if job is None:
                    with self._changed:
                        if not self._is_closed:
                            self._changed.wait(LOOK_S)
                        if self._is_closed:
                            return
                    self._jobs.take_back()
                else:
                    self._run(job)
            except Exception:  # a full disk, a lost registry: the job waits until it is taken back
                logger.exception("a job could not be run")
                time.sleep(LOOK_S)

    def _run(self, job: Job) -> None:
        try:
            with self._staging.scratch() as scratch:
                report = self._compressed(job, scratch)
                self._publish(job, scratch / "artifact", report)
        except Superseded:
            if self._is_closed:
                self._jobs.put_back(job)
        except DeltaServeError as error:
            self._fail(job, error.code, error.message)
        except _WorkerFailed as failure:
            self._fail(job, failure.code, failure.message)

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._staging.rows.renew(self._staging.rows.of_job(job.id))
        try:
            self._jobs.close(job, JobStatus.FAILED, error={"code": code, "message": message})
        except Superseded:
            return
        logger.info("job %s has failed: %s", job.id, code)

    def _compressed(self, job: Job, scratch: Path) -> dict[str, Any]:
        """The worker's report; its artifact lies in `scratch`. Raises Superseded, _WorkerFailed."""
        files = {file.id: file for file in self._staging.rows.of_job(job.id)}
        if absent := [file for file in job.files if file not in files]:
            raise NotFound(f"file {absent[0]} is gone", param="files")
        texts = {name: files[file] for name, file in job.asked["texts"].items()}
        checkpoint = [files[file] for file in job.asked["files"]]
        with (
            self._staging.laid_out(checkpoint, scratch / "checkpoint" / job.name) as folder,
            self._staging.laid_out(list(texts.values()), scratch / "texts") as beside,
        ):
            recipe = dict(job.asked["recipe"])
            if "calibration" in texts:
                recipe["calibration"] = str(beside / texts["calibration"].filename)
            order = Order(
                base_directory=str(self._base.directory.resolve()),
                base_name=self._base.name,
                base_files=[str(path.resolve()) for path in self._base.files],
                checkpoint=str(folder),
                out=str(scratch / "artifact"),
                recipe=recipe,
                rows=str(beside / texts["data"].filename) if "data" in texts else None,
                threads=self._bounds.threads,
                memory_bytes=self._bounds.memory_bytes,
            )
            return self._watched(job, order, scratch)

    def _watched(self, job: Job, order: Order, scratch: Path) -> dict[str, Any]:
        worker = WorkerProcess(order, scratch)
        with self._changed:
            self._workers[job.id] = worker
            if self._is_closed:
                worker.kill()
        deadline, progress, beaten = time.monotonic() + self._bounds.timeout_s, None, time.monotonic()
        try:
            while (line := worker.next_line(BEAT_S)) is not None:
                if "report" in line:
                    report: dict[str, Any] = line["report"]
                    return report
                if "error" in line:
                    code, message = (str(line["error"][name]) for name in ("code", "message"))
                    if code == "internal_error":
                        _note(job, worker)
                    raise _WorkerFailed(code, message)
                if "log" in line:
                    self._jobs.log(job, str(line["log"]), str(line["message"]))
                if "fraction" in line:
                    progress = {name: line[name] for name in ("step", "fraction", "seconds_left")}
                if time.monotonic() - beaten >= BEAT_S:
                    beaten = time.monotonic()
                    self._jobs.beat(job, progress)
                if beaten > deadline:
                    raise _WorkerFailed("timeout", f"the job took longer than {self._bounds.timeout_s} s")
            self._jobs.beat(job, progress)  # raises where it was cancelled
            if self._is_closed:
                raise Superseded
            _note(job, worker)
            raise _WorkerFailed("worker_died", worker.obituary())
        finally:
            with self._changed:
                del self._workers[job.id]
            worker.close()

    def _publish(self, job: Job, artifact: Path, report: dict[str, Any]) -> None:
        """The version and the job's end, both or neither. Raises Superseded, and what `Intake.accept` raises."""
        owner = self._accounts.owner(job.tenant_id, "job")
        gone: list[StagedFile] = []
        upload = self._intake.begin(self._intake.max_bytes)
        try:
            with artifact.open("rb") as source:
                for piece in pieces(source):
                    upload.write(piece)

            def also(stored: Stored) -> None:
                told = {"version": stored.version.number, "sha256": stored.version.digest}
                self._jobs.close(job, JobStatus.SUCCEEDED, result={**told, **report})
                gone.extend(self._staging.forget(job))

            self._intake.accept(Destination(owner, job.name, job.by, job.activates), upload, None, also)
        finally:
            upload.close()
        self._staging.drop(gone)
        self._on_published()


def _note(job: Job, worker: WorkerProcess) -> None:
    logger.error("the worker of job %s failed; the end of what it printed:\n%s", job.id, worker.evidence())


class _WorkerFailed(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
