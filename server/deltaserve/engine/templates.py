"""Chat templates, rendered where they can do no harm.

Owns: the worker processes (`template_worker.py`) and the deadline. Does not know: tokenizers, tenants, HTTP.
A template comes from a tenant and is hostile input: it is compiled and run only in a worker, never in this process.
At most one render of the same template runs at a time, so that one tenant's slow template holds one worker, not all.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve.errors import EngineFailure, QueueFull, TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping

WORKER_FILE = Path(__file__).with_name("template_worker.py")
WORKER_START_TIMEOUT_S = 30.0
MAX_WORKERS = 4
MAX_WAITING = 256  # for one template; each holds a thread of the server
MEMORY_MIB = 512
DEFAULTS: dict[str, object] = {"messages": [], "tools": None, "documents": None, "add_generation_prompt": False}
SAMPLE = {"messages": [{"role": "user", "content": "Hello."}], "bos_token": "<s>", "eos_token": "</s>"}
FAILURES = {
    "syntax": "the chat template does not parse: {message}",
    "raised": "the chat template refused the conversation: {message}",
    "sandbox": "the chat template tried what the sandbox forbids: {message}",
    "failed": "the chat template failed: {message}",
    "time": "the chat template took longer than {timeout_s:g} s",
    "memory": "the chat template needed more than {memory_mib} MiB",
    "output": "the chat template wrote more than {max_output_chars} characters",
    "died": "the chat template ended the process that rendered it",
}


class TemplateRenderer:
    """Renders chat templates as transformers does, within limits of time, memory and output. Thread-safe.

    Owns up to MAX_WORKERS processes, started when needed and replaced after a timeout or a death; `close` ends them.
    """

    def __init__(
        self, timeout_s: float = 2.0, max_template_bytes: int = 256 * 1024, max_output_chars: int = 4 * 1024 * 1024
    ) -> None:
        self._timeout_s, self._max_template_bytes = timeout_s, max_template_bytes
        self._limits = {"memory_mib": MEMORY_MIB, "max_output_chars": max_output_chars, "timeout_s": timeout_s}
        self._changed = threading.Condition()  # guards everything below
        self._idle = [_Worker(self._limits)]
        self._num_workers = 1
        self._rendering: set[str] = set()
        self._waiting: Counter[str] = Counter()  # requests by the template they want rendered
        self._is_closed = False

    def render(self, template: str, variables: Mapping[str, object]) -> str:
        """The text of `template` with `variables`: plain JSON values; those transformers always sets have defaults.

        Raises TemplateError with what the template did wrong, QueueFull when no worker came free in time (twice
        `timeout_s`), EngineFailure when no worker can run at all or the renderer is closed.
        """
        return self._run(template, variables)

    def check(self, template: str) -> None:
        """Compile `template` and render a small conversation with it. Raises as `render`, with one difference:

        a template that refuses the sample (`raise_exception`) or fails for want of a variable passes, as its own
        conversations may differ. Bad syntax, a broken limit and a forbidden access do not.
        """
        self._run(template, SAMPLE, tolerated=("raised", "failed"))

    def close(self) -> None:
        """End the workers; one that is rendering ends with its render. Later calls raise EngineFailure."""
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for worker in idle:
            worker.kill()

    def _run(self, template: str, variables: Mapping[str, object], tolerated: tuple[str, ...] = ()) -> str:
        num_bytes = len(template.encode("utf-8", "surrogatepass"))
        if num_bytes > self._max_template_bytes:
            raise TemplateError(f"the chat template has {num_bytes} bytes, allowed are {self._max_template_bytes}")
        try:
            job = json.dumps({"template": template, "variables": {**DEFAULTS, **variables}}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the chat template's variables are not plain JSON: {error}") from None
        worker = self._acquire(template)
        try:
            kind, message = worker.exchange(job, self._timeout_s)
        finally:
            self._release(template, worker)
        if kind == "text" or kind in tolerated:
            return message
        raise TemplateError(FAILURES[kind].format(message=message, **self._limits))

    def _acquire(self, template: str) -> _Worker:
        with self._changed:
            if self._waiting[template] >= MAX_WAITING:
                raise QueueFull(f"{MAX_WAITING} requests wait for this chat template already")
            self._waiting[template] += 1
            has_turn = self._changed.wait_for(
                lambda: (
                    self._is_closed
                    or (template not in self._rendering and (self._idle or self._num_workers < MAX_WORKERS))
                ),
                timeout=2 * self._timeout_s,
            )
            self._waiting[template] -= 1
            if not self._waiting[template]:
                del self._waiting[template]
            if not has_turn:
                raise QueueFull("other chat templates are being rendered and none finished in time")
            if self._is_closed:
                raise EngineFailure("the template renderer is closed")
            if not self._idle:
                self._idle.append(_Worker(self._limits))
                self._num_workers += 1
            self._rendering.add(template)
            return self._idle.pop()

    def _release(self, template: str, worker: _Worker) -> None:
        """Back to the idle ones, or, if it is not fit to serve another tenant, to its end and a fresh one started."""
        with self._changed:
            is_kept = worker.is_fit and not self._is_closed
            if is_kept:
                self._idle.append(worker)
            else:
                self._num_workers -= 1
            self._rendering.discard(template)
            if not self._idle and not self._is_closed:
                with contextlib.suppress(EngineFailure):  # the next caller tries again and is told
                    self._idle.append(_Worker(self._limits))
                    self._num_workers += 1
            self._changed.notify_all()
        if not is_kept:
            worker.kill()


class _Worker:
    """One worker process and the socket to it. Owned by one thread at a time. `is_fit` says whether it may go on."""

    def __init__(self, limits: dict[str, float]) -> None:
        command = [sys.executable, "-I", str(WORKER_FILE), *map(str, limits.values())]
        io, theirs = socket.socketpair()
        fd = theirs.fileno()
        try:
            with theirs:  # returns at once; the process gets ready while we go on
                self._process = subprocess.Popen(
                    command, stdin=fd, stdout=fd, stderr=subprocess.DEVNULL, env={}, cwd="/", start_new_session=True
                )
        except OSError as error:
            io.close()
            raise EngineFailure(f"the template worker cannot be started: {error}") from error
        self._socket = io
        self._max_reply_bytes = 6 * limits["max_output_chars"] + 2**16  # JSON spends at most 6 bytes on a character
        self._is_ready = False
        self.is_fit = True

    def exchange(self, job: bytes, timeout_s: float) -> tuple[str, str]:
        """("text", output), or the kind of failure (a key of FAILURES) and its message. Raises EngineFailure if the
        process never got ready. Clears `is_fit` when it may not serve anybody else."""
        self.is_fit = False
        if not self._is_ready:
            try:
                self._receive(time.monotonic() + WORKER_START_TIMEOUT_S)
            except OSError as error:
                raise EngineFailure(f"the template worker {WORKER_FILE} did not start") from error
            self._is_ready = True
        deadline = time.monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(struct.pack(">I", len(job)) + job)
            reply = json.loads(self._receive(deadline))
            self.is_fit = reply["retire"] is False
            return (reply["kind"] if reply["kind"] in ("text", *FAILURES) else "died"), str(reply["message"])
        except TimeoutError:
            return "time", ""
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # gone, or it is no longer our code
            return "died", ""

    def kill(self) -> None:
        """End the process and close the socket."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _receive(self, deadline: float) -> bytes:
        data, size = bytearray(), 4
        while len(data) < size:
            self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise ConnectionResetError("the worker ended")
            data += piece
            if size == 4 and len(data) == 4:
                size += struct.unpack(">I", data)[0]
                if size > self._max_reply_bytes:
                    raise ValueError(f"a reply of {size} bytes, allowed are {self._max_reply_bytes}")
        return bytes(data[4:])
