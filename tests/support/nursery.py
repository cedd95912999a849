"""`deltaserve serve` as a fork of a process that has imported everything: it starts at once, and may end at any step.

A step is a call that changes the disk: a statement of SQLite that is no question, what comes after a COMMIT, a rename,
a sync, a folder or a name that comes or goes. `Life.die_at(n)`: SIGKILL before the nth step from now on.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FORM = struct.Struct("qqqq")  # the fatal step (0: none; −1: count alone), the steps so far, the last COMMIT, an errno
TIMEOUT_S = 60.0
SQLITE = {  # what SQLite makes of an errno
    errno.ENOSPC: ("database or disk is full", sqlite3.SQLITE_FULL),
    errno.EROFS: ("attempt to write a readonly database", sqlite3.SQLITE_READONLY),
}
NOT_COUNTED = ("usage",)  # threads that write when they like


class Steps:
    """Shared with the process it counts in, through a file."""

    def __init__(self, path: Path) -> None:
        path.touch()
        os.truncate(path, FORM.size)
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), FORM.size)
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        return int(FORM.unpack(self._shared[:])[1])

    @property
    def last_commit(self) -> int:
        return int(FORM.unpack(self._shared[:])[2])

    def arm(self, fatal: int, error: int = 0) -> None:
        self._shared[:] = FORM.pack(fatal, 0, 0, error)

    def step(self, *, commits: bool = False) -> int:
        """→ the errno with which this step fails, 0 for one that does not."""
        with self._lock:
            fatal, taken, last, error = FORM.unpack(self._shared[:])
            if not fatal or threading.current_thread().name in NOT_COUNTED:
                return 0
            self._shared[:] = FORM.pack(fatal, taken + 1, taken + 1 if commits else last, error)
            if taken + 1 == fatal and not error:
                os.kill(os.getpid(), signal.SIGKILL)
            return int(error) if 0 < fatal <= taken + 1 else 0


class Life:
    """One process; `http` once it listens."""

    def __init__(self, nursery: Nursery, log: Path, steps: Steps, api_key: str | None) -> None:
        self.steps = steps
        self.pid = int(nursery.hear("pid"))
        self._nursery = nursery
        self._log = log
        self._status: int | None = None
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    @property
    def printed(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_ready(self) -> Life:
        """Raises AssertionError with its log if it ends before."""
        said, self.url = self._nursery.listen()
        if said == "ended":
            self._status = int(self.url)
            self.http.close()
            raise AssertionError(f"it ended with {self._status}:\n{self.printed}")
        self.http.base_url = httpx.URL(self.url)
        return self

    def die_at(self, step: int) -> None:
        """0: not any more."""
        self.steps.arm(step)

    def fail_from(self, step: int, error: int) -> None:
        """Until `die_at(0)`: from that step on nothing can be written, with that errno."""
        self.steps.arm(step, error)

    def kill(self) -> int:
        return self._end(signal.SIGKILL)

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def ended(self) -> int:
        """Its exit status, −9 for one that was killed; may be asked again."""
        if self._status is None:
            self._status = int(self._nursery.hear("ended"))
            self.http.close()
        return self._status

    def _end(self, by: signal.Signals) -> int:
        if self._status is None:
            os.kill(self.pid, by)
        return self.ended()


class Nursery:
    """One life at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lives = 0
        self._life: Life | None = None
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, base: Path, store: Path, *flags: str, api_key: str | None = None, die_at: int = 0) -> Life:
        """Does not wait until it listens; it may die before that. The life before ends."""
        self._end()
        self._lives += 1
        log, steps = self._folder / f"{self._lives}.log", self._folder / f"{self._lives}.steps"
        words = ["serve", str(base), "--port", "0", "--store", str(store), "--device", "cpu", "--dtype", "float32"]
        words += ["--num-threads", "1", "--served-model-name", "tiny", "--kv-cache-tokens", "1024", *flags]
        words += ["--api-key", api_key] if api_key else []
        counted = Steps(steps)
        counted.arm(die_at)
        assert self._process.stdin
        self._process.stdin.write(json.dumps([words, str(log), str(steps)]) + "\n")
        self._process.stdin.flush()
        self._life = Life(self, log, counted, api_key)
        return self._life

    def start(self, base: Path, store: Path, *flags: str, api_key: str | None = None) -> Life:
        return self.begin(base, store, *flags, api_key=api_key).wait_ready()

    def hear(self, word: str) -> str:
        """The rest of the next line of the process, which begins with `word`."""
        said, rest = self.listen()
        assert said == word, f"not {word}, but {said} {rest}"
        return rest

    def listen(self) -> tuple[str, str]:
        assert self._process.stdout
        said, _, rest = self._process.stdout.readline().strip().partition(" ")
        return said, rest

    def _end(self) -> None:
        if self._life is not None:
            self._life.kill()

    def close(self) -> None:
        self._end()
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(TIMEOUT_S)
        self._process.stdout.close()


def breed() -> None:
    """The process: a line of stdin is a life to be."""
    from transformers.models.llama import modeling_llama  # noqa: F401

    from deltaserve import app  # noqa: F401  all that a server imports
    from deltaserve.cli import main

    for line in sys.stdin:
        words, log, steps = json.loads(line)
        child = os.fork()
        if not child:
            _live(main, words, log, Steps(Path(steps)))
        _say(1, f"pid {child}")
        _, status = os.waitpid(child, 0)
        _say(1, f"ended {os.waitstatus_to_exitcode(status)}")


def _live(main: Callable[[Sequence[str]], int], words: list[str], log: str, steps: Steps) -> None:
    import uvicorn

    told = os.dup(1)
    os.set_inheritable(told, False)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    start = uvicorn.Server.startup

    async def startup(self: uvicorn.Server, *args: Any, **more: Any) -> None:
        await start(self, *args, **more)
        _say(told, "listening http://{}:{}".format(*self.servers[0].sockets[0].getsockname()))

    uvicorn.Server.startup = startup  # type: ignore[method-assign]
    _count(steps)
    status = 1
    try:
        status = main(words)
    finally:
        os._exit(status)


def _count(steps: Steps) -> None:
    """Every call that changes the disk is a step from now on."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            if error := steps.step():
                raise OSError(error, os.strerror(error))
            return call(*args, **more)

        return run

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.lstrip().startswith(("SELECT", "PRAGMA")) and "user_version =" not in sql:
                return super().execute(sql, *values)
            self._step(commits=sql == "COMMIT", works=sql == "ROLLBACK")
            done = super().execute(sql, *values)
            if sql == "COMMIT":
                steps.step()
            return done

        def _step(self, *, commits: bool, works: bool) -> None:
            if (error := steps.step(commits=commits)) and not works:
                failure = sqlite3.OperationalError(SQLITE[error][0])
                failure.sqlite_errorcode = SQLITE[error][1]
                raise failure

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **more: connect(*args, **more, factory=Connection)  # type: ignore[assignment]
    opened = os.open

    def open_counted(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT and (error := steps.step()):
            raise OSError(error, os.strerror(error))
        return opened(path, flags, *args, **more)

    os.open = open_counted  # type: ignore[assignment]
    for name in ("replace", "fsync", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def _say(descriptor: int, text: str) -> None:
    os.write(descriptor, f"{text}\n".encode())


@contextmanager
def nursery() -> Iterator[Nursery]:
    with tempfile.TemporaryDirectory(prefix="nursery-") as folder:
        made = Nursery(Path(folder))
        try:
            yield made
        finally:
            made.close()


if __name__ == "__main__":
    breed()
