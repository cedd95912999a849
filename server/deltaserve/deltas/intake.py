"""The way of an upload from bytes to a served version: checked whole, on the CPU, before a name points to it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.companions import load_tokenizer
from deltaserve.deltas.store import DeltaStore, Destination, Stored, Upload
from deltaserve.deltas.validate import check_against_base, check_numbers

Check = Callable[[Artifact], None]
BEHIND = 10  # nice: with 16 uploads at once answers took 4 times as long on two cores, with it 1.5 times


class Intake:
    """`checks`: what the serving side asks of an artifact beyond the format (raises DeltaServeError)."""

    def __init__(self, store: DeltaStore, base: Checkpoint, checks: list[Check], max_bytes: int) -> None:
        self._store = store
        self._base = base
        self._checks = checks
        self.max_bytes = max_bytes

    def begin(self, max_bytes: int) -> Upload:
        return self._store.begin_upload(max_bytes)

    def accept(
        self,
        to: Destination,
        upload: Upload,
        expected_sha256: str | None,
        also: Callable[[Stored], None] = lambda stored: None,
    ) -> Stored:
        """A whole upload becomes a version; `also` is written with it. Raises whatever is wrong with it; then nothing
        is kept."""
        digest = upload.finish(expected_sha256)
        artifact = Artifact.open(upload.path, called=f"{to.name}.safetensors")
        self.check(artifact)
        return self._store.commit(to, upload, digest, summary(artifact), also)

    def check(self, artifact: Artifact) -> None:
        check_against_base(artifact, self._base)
        check_numbers(artifact, self._base)
        for check in self._checks:
            check(artifact)
        if artifact.manifest.added_tokens or artifact.manifest.special_tokens:
            load_tokenizer(self._base.directory, artifact.manifest)


def upload_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads that receive and check uploads. Where other threads want the cores too, these come after them."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="upload", initializer=_step_behind)


def _step_behind() -> None:
    if sys.platform == "linux":  # elsewhere all threads of a process have one priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BEHIND)


def summary(artifact: Artifact) -> dict[str, Any]:
    """What a listing says of an artifact."""
    manifest = artifact.manifest
    return {
        "codec": manifest.codec,
        "disk_bytes": artifact.file.num_bytes,
        "resident_bytes": artifact.resident_bytes,
        "bits_per_parameter": round(artifact.bits_per_parameter, 6),
        "base": manifest.base.fingerprint,
    }
