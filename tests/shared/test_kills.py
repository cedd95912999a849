"""A server killed at any moment, on a PostgreSQL and an S3 that another server goes on with."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from deltaserve.deltas.places import open_places
from deltaserve.deltas.store import DeltaStore
from deltaserve.tenants.accounts import Accounts, Caller

if TYPE_CHECKING:
    from pathlib import Path

KILLS, MOST_KILLS = 12, 100
LONGEST_S = 0.6  # a life; an upload takes about 0.05 on an idle machine

# For each line: a process that uploads versions of three models, one after the other, and tells what was acknowledged.
UPLOADING = """
import hashlib, json, os, sys
from pathlib import Path
from deltaserve.deltas.places import open_places
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.tenants.accounts import Accounts
import obstore, psycopg

def say(*words):
    os.write(1, json.dumps(words).encode() + b"\\n")

def work(i):
    store, url, cache = sys.argv[1:]
    registry, files = open_places(store, url, Path(cache), 1 << 20)
    store, owner = DeltaStore(registry, files), Accounts(registry).default
    say("ready", os.getpid())
    while True:
        i += 1
        upload = store.begin_upload(1 << 30)
        upload.write(hashlib.sha256(b"%d" % i).digest() * 3000)
        stored = store.commit(Destination(owner, f"n{i % 3}", "test"), upload, upload.finish(None), {"i": i})
        upload.close()
        say("kept", i, stored.model.name)

for line in sys.stdin:
    child = os.fork()
    if not child:
        work(int(line))
    os.waitpid(child, 0)
    say("gone")
"""


def test_what_was_acknowledged_is_whole_and_the_rest_goes(postgres_url: str, s3_url: str, tmp_path: Path) -> None:
    chance, last, kept = random.Random(7), 0, dict[str, int]()
    registry, files = open_places(s3_url, postgres_url, tmp_path / "b", 1 << 20)
    store, me = DeltaStore(registry, files), Caller(Accounts(registry).default, "-", frozenset())

    def look() -> None:
        """The other server: every acknowledged version or the one after it is there, and is what it was."""
        nonlocal last, kept
        models = store.models.visible(me)
        found: dict[str, int] = {model.name: model.active.summary["i"] for model in models}
        assert all(found[name] in (i, last + 1) for name, i in kept.items())
        for model in models:
            with store.reading(model.active.digest) as path:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == model.active.digest
        registry.audit("b", "looked", "x")  # nobody holds a dead server's turn
        last, kept = max([last, *found.values()]), found

    command: list[Any] = [sys.executable, "-c", UPLOADING, s3_url, postgres_url, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        for life in range(MOST_KILLS):  # more than KILLS where a life is too short for an upload, on a busy machine
            if life >= KILLS and last > 3:
                break
            process.stdin.write(f"{last}\n")
            process.stdin.flush()
            ready, pid = json.loads(process.stdout.readline())
            assert ready == "ready"
            deadline_s = time.monotonic() + chance.uniform(0.0, LONGEST_S)
            while time.monotonic() < deadline_s:
                pass
            os.kill(pid, signal.SIGKILL)
            for line in iter(process.stdout.readline, '["gone"]\n'):
                _, last, name = json.loads(line)
                kept[name] = last
            look()
    with registry.write() as db:  # an hour and more passes
        db.execute("UPDATE removals SET due = 0")
    store.sweep()
    named = {model.active.digest for model in store.models.visible(me)}
    assert {key.rpartition("/")[2].partition(".")[0] for key in files.keys("objects")} == named
    assert registry.rows("SELECT * FROM removals") == []
    assert last > 3
    registry.close()
    files.close()
