"""Uploaded files that are no artifacts: kept as they are, under files/ID/SHA256, until a job has read them.

A file is acknowledged after its bytes and its row are synced to disk. It goes with the last job that reads it, by
DELETE, or after a time without a job. It is hostile input: safetensors headers are checked here, the rest is bounded in
bytes and read by the worker alone.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deltaserve.deltas.files import staged_key
from deltaserve.deltas.store import DeltaStore, Upload
from deltaserve.deltas.tensorfile import TensorFile
from deltaserve.errors import (
    ArtifactCorrupt,
    ArtifactTooLarge,
    BadRequest,
    CheckpointError,
    FileInUse,
    InvalidName,
    NotFound,
)
from deltaserve.tenants.accounts import Caller, Tenant
from deltaserve.tenants.files import StagedFile, StagedFiles
from deltaserve.tenants.jobs import Job
from deltaserve.tenants.registry import Registry

FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
KINDS = {".safetensors": 2**62, ".json": 16 * 2**20, ".jsonl": 64 * 2**20, ".jinja": 2**20}  # suffix → most bytes
TOKENIZER, TOKENIZER_BYTES = "tokenizer.json", 64 * 2**20  # the server does not parse it


def check_filename(filename: str) -> None:
    """Raises InvalidName."""
    if not FILENAME.fullmatch(filename) or Path(filename).suffix not in KINDS:
        raise InvalidName(
            f"{filename[:200]!r} must be one name, without folders, ending in {', '.join(KINDS)}; pickle formats such "
            "as .bin are not read",
            param="filename",
        )


class Staging:
    """Thread-safe."""

    def __init__(
        self, registry: Registry, store: DeltaStore, *, expires_s: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.rows = StagedFiles(registry, expires_s, clock)
        self._registry = registry
        self._store = store
        known = {_key(file) for file in self.rows.all()}
        if not registry.is_shared:
            for key in store.files.keys("files"):
                if key not in known:  # a crash came before its row
                    store.files.remove(key)

    def keep(
        self,
        owner: Tenant,
        filename: str,
        purpose: str,
        upload: Upload,
        expected_sha256: str | None,
        also: Callable[[StagedFile], None] = lambda file: None,
    ) -> StagedFile:
        """A whole upload becomes a file; `also` is written with it. Raises DigestMismatch, CheckpointError,
        ArtifactTooLarge, QuotaExceeded, StorageFull; then nothing is kept."""
        digest = upload.finish(expected_sha256)
        _check(upload.path, filename, upload.num_bytes)
        file = self.rows.new(owner, filename, purpose, upload.num_bytes, digest)
        try:
            named = self._store.bring_in(_key(file), upload.path)
            with self._registry.write():
                self.rows.add(file, owner)
                self._store.models.check_quota(owner)
                also(file)
                named()
        except BaseException:
            self.drop([file])
            raise
        return file

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on this server for a while; what a crash leaves of it goes at the next start."""
        with tempfile.TemporaryDirectory(prefix="job-", dir=self._store.files.incoming) as folder:
            yield Path(folder).resolve()

    @contextmanager
    def laid_out(self, files: Sequence[StagedFile], folder: Path) -> Iterator[Path]:
        """A folder with the files under their names, while they are read. Raises BadRequest for two of one name,
        NotFound for one that is gone."""
        names = [file.filename for file in files]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BadRequest(f"two of the files are called {twice[0]}", param="files")
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            for file in files:
                try:
                    path = stack.enter_context(self._store.files.reading(_key(file)))
                except FileNotFoundError:
                    raise NotFound(f"file {file.id} is gone", param="files") from None
                (folder / file.filename).symlink_to(path.resolve())
            yield folder

    def delete(self, caller: Caller, file_id: str) -> None:
        """Raises NotFound, FileInUse."""
        self._remove(self.rows.find(caller, file_id))

    def delete_all(self, tenant: Tenant) -> None:
        for file in self.rows.of(tenant):
            self._remove(file)

    def forget(self, job: Job) -> list[StagedFile]:
        """In the transaction in which a job ends: what no other job is to read goes with it; → what to `drop` then."""
        gone = []
        for file in self.rows.of_job(job.id):
            with contextlib.suppress(FileInUse):
                self._take(file)
                gone.append(file)
        return gone

    def drop(self, files: Sequence[StagedFile]) -> None:
        """The bytes of files that have no row any more. Where servers share them, `DeltaStore.sweep` does it."""
        for file in () if self._registry.is_shared else files:
            self._store.files.remove(_key(file))

    def sweep(self) -> None:
        """Ends what has expired; called every now and then."""
        for file in self.rows.expired():
            with contextlib.suppress(FileInUse, NotFound):
                self._remove(file)

    def _remove(self, file: StagedFile) -> None:
        self._take(file)
        self.drop([file])

    def _take(self, file: StagedFile) -> None:
        """Its row. Raises FileInUse, NotFound."""
        with self._registry.write():
            self.rows.remove(file)
            if self._registry.is_shared:
                self._store.removals.note([_key(file)], 0)


def _key(file: StagedFile) -> str:
    return staged_key(file.id, file.sha256)


def _check(path: Path, filename: str, num_bytes: int) -> None:
    suffix = Path(filename).suffix
    most = TOKENIZER_BYTES if filename == TOKENIZER else KINDS[suffix]
    if num_bytes > most:
        raise ArtifactTooLarge(f"{filename}: {num_bytes} bytes; at most {most} are accepted")
    if suffix == ".safetensors":
        try:
            TensorFile.open(path)
        except ArtifactCorrupt as error:
            raise CheckpointError(error.message.replace(path.name, filename, 1)) from None
