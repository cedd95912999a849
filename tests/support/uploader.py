"""A process that uploads versions of three models, one after the other, tells what was acknowledged, and is killed."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Uploader:
    """`store`, `registry`: of `deltaserve serve`; `cache`: a folder of its own. Forks for each life: what it has to
    import, it has imported."""

    def __init__(self, store: str, registry: str | None, cache: Path) -> None:
        command = [sys.executable, __file__, store, registry or "", str(cache)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.__exit__(*error)

    def live(self, last: int, seconds: float) -> dict[str, int]:
        """A life that uploads number last + 1 and so on, until it is killed: the last number that was acknowledged, by
        the model's name. Number i is in its version's summary."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{last}\n")
        self._process.stdin.flush()
        ready, pid = json.loads(self._process.stdout.readline())
        assert ready == "ready"
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            pass
        os.kill(pid, signal.SIGKILL)
        said = map(json.loads, iter(self._process.stdout.readline, '["gone"]\n'))
        return {name: number for _, number, name in said}


def _say(*words: Any) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def _work(number: int) -> None:
    store_url, registry_url, cache = sys.argv[1:]
    registry, files = open_places(store_url, registry_url or None, Path(cache), 1 << 20)
    store, owner = DeltaStore(registry, files), Accounts(registry).default
    _say("ready", os.getpid())
    while True:
        number += 1
        upload = store.begin_upload(1 << 30)
        data = hashlib.sha256(b"%d" % number).digest() * 3000
        for start in range(0, len(data), 8192):
            upload.write(data[start : start + 8192])
        to = Destination(owner, f"n{number % 3}", "test")
        stored = store.commit(to, upload, upload.finish(None), {"i": number})
        upload.close()
        _say("kept", number, stored.model.name)


if __name__ == "__main__":
    for library in ("obstore.store", "psycopg") if sys.argv[2] else ():  # which are imported when they are needed
        importlib.import_module(library)
    from deltaserve.deltas.places import open_places
    from deltaserve.deltas.store import DeltaStore, Destination
    from deltaserve.tenants.accounts import Accounts

    for line in sys.stdin:
        if not (child := os.fork()):
            _work(int(line))
        os.waitpid(child, 0)
        _say("gone")
