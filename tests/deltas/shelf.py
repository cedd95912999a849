"""A residency over a few artifacts, and what it reads."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.limits import Limits
from deltaserve.deltas.residency import Residency
from deltaserve.ids import DeltaDigest, Slot

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


WAIT_S = 20.0
NUM = 5


class Shelf:
    """A residency and the files it reads."""

    def __init__(
        self, files: dict[DeltaDigest, Path], device: int = 2, host: int = 8, kind: str = "cpu", **limits: Any
    ) -> None:
        self.files = dict(files)
        self.digests = list(files)
        self.reads: list[DeltaDigest] = []
        self.ready = threading.Semaphore(0)
        self.disk = threading.Event()  # reads wait while it is clear
        self.disk.set()
        self.now = 0.0
        self.moves: list[str] = []
        self.residency = Residency(
            lambda digest: nullcontext(self._path(digest)),
            torch.device(kind),
            Limits(device, host, **limits),
            on_ready=self.ready.release,
            on_loaded=lambda tier, seconds: self.moves.append(tier),
            clock=lambda: self.now,
        )

    def _path(self, digest: DeltaDigest) -> Path:
        self.reads.append(digest)
        assert self.disk.wait(WAIT_S)
        return self.files[digest]

    @property
    def num_read(self) -> int:
        return len(self.reads)

    def wait_for(self, *states: str) -> None:
        """Until the first deltas are in these states."""
        while self.states()[: len(states)] != list(states):
            assert self.ready.acquire(timeout=WAIT_S), f"{self.states()}, not {states}"

    def want(self, *which: int, held: Sequence[int] = ()) -> None:
        self.residency.want([self.digests[one] for one in which], [self.digests[one] for one in held])

    def pin(self, which: int) -> Slot:
        """Pinned, loaded first where it must be."""
        for _ in range(6):
            slot = self.residency.try_pin(self.digests[which])
            if slot is not None:
                return slot
            assert self.ready.acquire(timeout=WAIT_S)
        raise AssertionError("it does not come")

    def use(self, *which: int) -> None:
        for one in which:
            self.residency.unpin(self.pin(one))

    def states(self) -> list[str]:
        return [self.residency.state(digest) for digest in self.digests]


def size_of(shelf: dict[DeltaDigest, Path]) -> int:
    return Artifact.open(next(iter(shelf.values()))).resident_bytes
