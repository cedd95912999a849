"""A worker process (`deltaserve.worker`) as the server sees it: an order goes in, lines come out, until it ends."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltaserve.deltas.order import Order

MAX_LINE_BYTES = 64 * 1024
MAX_LINES = 1000  # that wait to be read
EVIDENCE_BYTES = 4000  # of its stderr, for the server's log


class WorkerProcess:
    """A process for one order. `close` ends it in any case."""

    def __init__(self, order: Order, scratch: Path) -> None:
        # Not the server's environment, which has keys; no GPU, no network for the hub.
        environment = {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "HOME": str(scratch),
            "TMPDIR": str(scratch),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(order.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._stderr = (scratch / "stderr").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deltaserve.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            cwd=scratch,
            process_group=0,  # Ctrl-C is the server's; a session of its own would be scheduled as the server's equal
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_LINES)
        self._reader = threading.Thread(target=self._read, name="job-reader", daemon=True)
        self._reader.start()
        assert self._process.stdin
        with suppress(OSError):  # it is gone: the reader says so
            self._process.stdin.write(order.line().encode())
            self._process.stdin.flush()  # and it stays open: the worker ends when it is closed

    def next_line(self, timeout_s: float) -> dict[str, Any] | None:
        """{} if there is none in time, None when the process has ended."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return {}

    def kill(self) -> None:
        self._process.kill()

    def obituary(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "the process that compresses was killed from outside, most likely because memory ran out"
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"the process that compresses ended with {how}; the server's log has the reason"

    def evidence(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(size - EVIDENCE_BYTES, 0))
        return self._stderr.read().decode(errors="replace")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with suppress(OSError):
                pipe.close()
        self._stderr.close()

    def _read(self) -> None:
        assert self._process.stdout
        with suppress(OSError, ValueError):  # closed, or cut in the middle: its end tells
            while line := self._process.stdout.readline(MAX_LINE_BYTES):
                found = json.loads(line)
                if isinstance(found, dict):
                    self._lines.put(found)
        self._lines.put(None)
