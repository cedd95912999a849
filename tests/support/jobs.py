"""Fine-tunes to a server's jobs, over plain HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import httpx


def send_file(http: httpx.Client, path: Path, data: bytes | None = None) -> str:
    """The id of the file, whose bytes may be others."""
    content = path.read_bytes() if data is None else data
    reply = http.post("/v1/files", data={"purpose": "user_data"}, files={"file": (path.name, content)})
    assert reply.status_code == 200, reply.text
    file_id: str = reply.json()["id"]
    return file_id


def send(http: httpx.Client, directory: Path) -> list[str]:
    return [send_file(http, path) for path in sorted(directory.iterdir()) if path.suffix != ".md"]


def create(http: httpx.Client, name: str, files: Iterable[str], **recipe: Any) -> dict[str, Any]:
    reply = http.post("/v1/compressions", json={"name": name, "files": list(files), **recipe})
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()
    return job


def look(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    reply = http.get(f"/v1/compressions/{job['id']}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def ended(http: httpx.Client, job: dict[str, Any], wait_until: Callable[..., Any]) -> dict[str, Any]:
    def now() -> dict[str, Any] | None:
        found = look(http, job)
        return None if found["status"] in ("queued", "running") else found

    found: dict[str, Any] = wait_until(now, "the job has ended", 400)
    return found


def workers(server: Any) -> list[int]:
    """Processes of a server that compress."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == server.process.pid and b"deltaserve.worker" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it has just ended
                continue
    return found


def left(store: Path) -> list[str]:
    """What files and jobs have left in the store."""
    walks = [os.walk(store / top) for top in ("files", "parts", "incoming")]  # folders may go meanwhile
    return sorted(name for walk in walks for _, folders, files in walk for name in (*folders, *files))
