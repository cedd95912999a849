"""Compressing in a process of its own, so that its time and its peak of memory are its own."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import threading
import time
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deltaserve.errors import DeltaServeError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from deltaserve.codecs.base import Codec
    from deltaserve.deltas.checkpoint import Checkpoint


class Cost(NamedTuple):
    seconds: float  # of `make_delta`, without the start of the process
    peak_bytes: int  # resident at most: interpreter, torch, and the pages of mapped checkpoints


def compress_apart(
    base: Checkpoint, finetuned: Checkpoint, codec: Codec, out: Path, seed: int, calibration: str = "builtin"
) -> Cost:
    """`deltas.prepare.make_delta` in a fresh process. Raises what it raises, and ChildProcessError if it dies."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    work = (sender, base, finetuned, codec, out, seed, calibration)
    process = context.Process(target=_compress, args=work, daemon=True)
    try:
        with _interrupts_held():
            process.start()
        sender.close()
        outcome: Cost | DeltaServeError = receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"the process that compresses died: exit status {process.exitcode}") from None
    finally:
        if process.pid is not None:
            process.terminate()
            process.join()
        receiver.close()
    if isinstance(outcome, DeltaServeError):
        raise outcome
    return outcome


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the process is started, which inherits that it waits: it is the parent that ends it. The mask
    is for the child; in this process another thread may take the signal, and Python would still raise here."""
    resource_tracker.ensure_running()  # its start, part of the first process', would let interrupts through again
    noted: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if noted:
        signal.raise_signal(signal.SIGINT)


def _compress(
    sender: Connection,
    base: Checkpoint,
    finetuned: Checkpoint,
    codec: Codec,
    out: Path,
    seed: int,
    calibration: str,
) -> None:
    from deltaserve.deltas.prepare import make_delta

    start = time.perf_counter()
    try:
        make_delta(base, finetuned, codec, out, seed=seed, calibration=calibration)
        sender.send(Cost(time.perf_counter() - start, peak_bytes()))
    except DeltaServeError as error:
        sender.send(error)


def peak_bytes() -> int:
    """Resident at most, of this process. Linux counts the parent's into a child's ru_maxrss (fork before exec), and
    into VmHWM nothing from before the exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
