"""A real PostgreSQL of one's own, on a free port of loopback: Debian's package, started and stopped as its user."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

PACKAGED = Path("/usr/lib/postgresql")  # where Debian puts what is not on PATH
FAST = "-c fsync=off -c full_page_writes=off -c max_connections=200"  # the machine will not lose power


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl, of the newest version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    return max((path.parent for path in PACKAGED.glob("*/bin/initdb")), default=None)


class Postgres:
    """`url(name)` is a registry of its own, empty at first. Skips the test where there is no PostgreSQL."""

    def __init__(self) -> None:
        found = binaries()
        if found is None:
            pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
        self._binaries = found
        self._data = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's folders are closed to other users
        self._user = None
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            self._user = next(user.pw_name for user in pwd.getpwall() if user.pw_name in ("postgres", "nobody"))
            shutil.chown(self._data, self._user)
        self._run("initdb", "--auth=trust", "--username=deltaserve", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        listen = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories= -p {self.port} {FAST}"
        self._run("pg_ctl", "start", "--wait", "--log", str(self._data / "log"), "--options", listen)

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "stop", "--wait", "--mode", mode)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._data)

    def url(self, name: str) -> str:
        """A schema of that name."""
        import psycopg

        root = f"postgresql://deltaserve@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(root, autocommit=True) as connection:
            connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{name}"'.encode())
        return f"{root}?options=-csearch_path%3D{name}"

    def _run(self, program: str, *words: str) -> None:
        command = [str(self._binaries / program), "--pgdata", str(self._data), *words]
        done = subprocess.run(command, user=self._user, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
