"""A store with something of everything, the operations that change it, and kills at their steps: by real HTTP.

before ──operation──▶ after        killed at a step: one of both, whole and served, and nothing else is on the disk
"""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import time
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

ADMIN = "first-key"
MAX_TOKENS = 12  # of an answer
JOB_S = 300.0  # at most
FLAGS = ("--keep-versions", "2")


def fresh(data: bytes, number: int) -> bytes:
    """The same weights under another digest: spaces after the header."""
    size, spaces = int.from_bytes(data[:8], "little"), b" " * 8 * number
    return (size + len(spaces)).to_bytes(8, "little") + data[8 : 8 + size] + spaces + data[8 + size :]


@dataclass
class Scene:
    """`artifacts`: four files; `answers`: of each file by its digest: (prompt, text), greedy, MAX_TOKENS long.
    `checkpoint`: files of a fine-tune. `check`: what is wrong with a store on which no server works."""

    nursery: Any
    base: Path
    folder: Path
    artifacts: Sequence[bytes]
    answers: dict[str, tuple[str, str]]
    checkpoint: Mapping[str, bytes]
    check: Callable[[Path], Iterable[str]]
    uploads: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    is_acknowledged: bool = False  # the operation of the last kill
    num_kills: int = 0
    num_versions: int = 0

    def build(self) -> None:
        """acme has two versions of m and a twin of the second; uploads that are whole, half there, and empty; files
        for a job."""
        self.template = self.folder / "template"
        life = self.start(self.template)
        http, (one, two, three, four) = life.http, self.artifacts
        for tenant in ("acme", "globex"):
            _did(http.post("/v1/admin/tenants", json={"name": tenant}))
            body = {"tenant": tenant, "scopes": ["inference", "manage"]}
            self.keys[tenant] = _did(http.post("/v1/admin/keys", json=body))["id"]
        for name, data in (("m", one), ("m", two), ("twin", two)):
            _did(http.put(f"/v1/deltas/acme:{name}", content=data))
        for name, pieces in (("whole", [three[:99], three[99:]]), ("half", [four[:99]]), ("empty", [])):
            num_bytes = len(four) if name == "half" else len(three)
            body = {"bytes": num_bytes, "filename": "acme:m.safetensors", "mime_type": "x", "purpose": "fine-tune"}
            self.uploads[name] = _did(http.post("/v1/uploads", json=body))["id"]
            for piece in pieces:
                _did(http.post(f"/v1/uploads/{self.uploads[name]}/parts", files={"data": piece}))
        self.files = [_did(_stage(http, *file))["id"] for file in self.checkpoint.items()]
        self.before = self.look(http)
        assert life.stop() == 0

    def start(self, store: Path, **options: Any) -> Any:
        return self.nursery.start(self.base, store, *FLAGS, api_key=ADMIN, **options)

    def copy(self) -> Path:
        store = self.folder / "store"
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(self.template, store)
        return store

    def look(self, http: httpx.Client, *, asks: bool = True) -> dict[str, Any]:
        """What the server says once its jobs have ended; every version of every model is asked."""
        jobs = sorted((job["name"], job["status"], job["model"]) for job in self.ended_jobs(http))
        models = {}
        for card in _did(http.get("/v1/deltas"))["data"]:
            versions = _did(http.get(f"/v1/deltas/{card['id']}/versions"))["data"]
            pointers = [card[what] for what in ("version", "canary", "pinned", "shared_with")]
            models[card["id"]] = [pointers, [(version["version"], version["sha256"]) for version in versions]]
            for version in versions if asks else ():
                self.ask(http, f"{card['id']}@{version['version']}", version["sha256"])
        uploads = {}
        for name, key in self.uploads.items():
            upload = _did(http.get(f"/v1/uploads/{key}"))
            uploads[name] = [upload["status"], sorted(part["id"] for part in upload["parts"])]
        keys = [[key["tenant"], key["revoked"] is None, key["expires"] is None] for key in _listed(http, "keys")]
        tenants = [[tenant["id"], tenant["limits"]] for tenant in _listed(http, "tenants")]
        told = {"keys": sorted(keys), "tenants": sorted(tenants, key=str), "jobs": jobs}
        files = sorted((file["filename"], file["sha256"]) for file in _did(http.get("/v1/files"))["data"])
        return {"models": models, "uploads": uploads, "files": files, **told}

    def ended_jobs(self, http: httpx.Client) -> list[dict[str, Any]]:
        deadline_s = time.monotonic() + JOB_S
        while True:
            jobs: list[dict[str, Any]] = _did(http.get("/v1/compressions"))["data"]
            if all(job["finished_at"] for job in jobs):
                return jobs
            assert time.monotonic() < deadline_s, jobs
            time.sleep(0.05)

    def ask(self, http: httpx.Client, model: str, digest: str) -> None:
        """Raises AssertionError for an answer that is not that of the weights. Of weights that a job has made: that is
        not the first answer."""
        prompt, text = self.answers.get(digest, (next(iter(self.answers.values()))[0], None))
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS}
        said = _did(http.post("/v1/completions", json=body))["choices"][0]["text"]
        self.answers.setdefault(digest, (prompt, said))
        assert said == self.answers[digest][1], model
        self.num_versions += 1

    def measure(self, name: str) -> tuple[int, int, dict[str, Any]]:
        """(steps of an operation, the last that commits, the state after it)"""
        life = self.start(self.copy())
        life.die_at(-1)
        _did(OPERATIONS[name](self, life.http))
        steps, commit = life.steps.taken, life.steps.last_commit
        life.die_at(0)
        after = self.look(life.http)
        assert life.stop() == 0, life.printed
        assert list(self.check(self.folder / "store")) == []
        assert after != self.before
        return steps, commit, after

    def kill(self, name: str, step: int) -> dict[str, Any]:
        """→ the state that is found after a kill at that step."""
        store = self.copy()
        life = self.start(store)
        self.is_acknowledged = False
        life.die_at(step)
        try:
            reply = OPERATIONS[name](self, life.http)
        except httpx.HTTPError:
            assert life.ended() == -9, life.printed
        else:  # the steps of a request may be fewer than last time
            _did(reply)
            self.is_acknowledged = True
            life.kill()
        self.num_kills += 1
        return self.after_restart(store)

    def after_restart(self, store: Path) -> dict[str, Any]:
        life = self.start(store)
        found = self.look(life.http)
        assert life.stop() == 0, life.printed
        assert list(self.check(store)) == []
        return found

    def allowed(self, name: str, after: dict[str, Any]) -> list[dict[str, Any]]:
        before = self.before
        states = [before, after]
        if name == "rotate a key":  # the new key comes first: rather two than none
            states.append({**before, "keys": sorted([*before["keys"], ["acme", True, True]])})
        if name == "delete a tenant":  # uploads one by one, then its models, then itself
            names = list(before["uploads"])
            for chosen in itertools.product((before, after), repeat=len(names)):
                uploads = {key: state["uploads"][key] for key, state in zip(names, chosen, strict=True)}
                states.append({**before, "uploads": uploads})
            states.append({**before, "uploads": after["uploads"], "models": after["models"]})
        if name == "cancel a job":  # it may run to its end before
            states.append(self.measure("compress")[2])
        return states

    def migrate(self, store: Path, step: int) -> bool:
        """A store of the first schema is opened, and the process killed at a step; → whether it came that far. Raises
        AssertionError if the next start does not serve what the store had."""
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir(mode=0o700)
        data = self.artifacts[0]
        digest = sha256(data).hexdigest()
        (store / "objects" / digest[:2]).mkdir(parents=True)
        (store / "objects" / digest[:2] / f"{digest}.safetensors").write_bytes(data)
        connection = sqlite3.connect(store / "registry.sqlite")
        connection.executescript(FIRST_SCHEMA)
        connection.execute("INSERT INTO deltas VALUES ('old', 3, ?, 1, ?)", (digest, OLD_SUMMARY % len(data)))
        connection.commit()
        connection.close()
        life = self.nursery.begin(self.base, store, *FLAGS, api_key=ADMIN, die_at=step)
        try:
            life.wait_ready()
        except AssertionError:
            assert life.ended() == -9, life.printed
        else:
            life.kill()
            return False
        self.num_kills += 1
        again = self.start(store)
        self.ask(again.http, "old@3", digest)
        self.ask(again.http, "old", digest)
        assert again.stop() == 0
        assert list(self.check(store)) == []
        return True


FIRST_SCHEMA = """
CREATE TABLE deltas (name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, created INTEGER NOT NULL,
summary TEXT NOT NULL, PRIMARY KEY (name, version)) STRICT;
PRAGMA user_version = 1;
"""
OLD_SUMMARY = '{"codec": "x", "disk_bytes": %d, "resident_bytes": 1, "bits_per_parameter": 1, "base": "x"}'


def _did(reply: httpx.Response) -> Any:
    assert reply.is_success, f"{reply.request.method} {reply.request.url} {reply.status_code} {reply.text}"
    return reply.json()


def _listed(http: httpx.Client, what: str) -> list[dict[str, Any]]:
    return list(_did(http.get(f"/v1/admin/{what}"))["data"])


def _upload(name: str, index: int) -> Callable[[Scene, httpx.Client], httpx.Response]:
    return lambda scene, http: http.put(f"/v1/deltas/acme:{name}", content=scene.artifacts[index])


def _part(name: str) -> Callable[[Scene, httpx.Client], httpx.Response]:
    def send(scene: Scene, http: httpx.Client) -> httpx.Response:
        data = scene.artifacts[3][99:] if name == "half" else scene.artifacts[2][:99]
        return http.post(f"/v1/uploads/{scene.uploads[name]}/parts", files={"data": data})

    return send


def _complete(scene: Scene, http: httpx.Client) -> httpx.Response:
    data = scene.artifacts[2]
    parts = [f"part_{sha256(piece).hexdigest()}" for piece in (data[:99], data[99:])]
    return http.post(f"/v1/uploads/{scene.uploads['whole']}/complete", json={"part_ids": parts})


def _stage(http: httpx.Client, filename: str, data: bytes) -> httpx.Response:
    return http.post("/v1/files", data={"purpose": "user_data"}, files={"file": (filename, data)})


def _job(scene: Scene, http: httpx.Client) -> str:
    body = {"name": "acme:made", "files": scene.files, "codec": "bitdelta"}
    key: str = _did(http.post("/v1/compressions", json=body))["id"]
    return key


def _compress(scene: Scene, http: httpx.Client) -> httpx.Response:
    """Acknowledged before it is done: after a kill the next server does it."""
    path = f"/v1/compressions/{_job(scene, http)}"
    scene.is_acknowledged = True
    scene.ended_jobs(http)
    return http.get(path)


def _move(http: httpx.Client) -> httpx.Response:
    change = {"version": 1, "canary": {"version": 2, "percent": 50}, "pinned": True, "shared_with": ["globex"]}
    return http.patch("/v1/deltas/acme:m", json=change)


NEW_KEY = {"tenant": "acme", "scopes": ["inference"]}
OPERATIONS: dict[str, Callable[[Scene, httpx.Client], httpx.Response]] = {
    "upload": _upload("m", 2),
    "upload under a new name": _upload("new", 3),
    "upload again": _upload("m", 0),
    "first part": _part("empty"),
    "part": _part("half"),
    "complete": _complete,
    "cancel": lambda scene, http: http.post(f"/v1/uploads/{scene.uploads['whole']}/cancel"),
    "stage a file": lambda scene, http: _stage(http, "rows.jsonl", b"{}"),
    "delete a file": lambda scene, http: http.delete(f"/v1/files/{scene.files[0]}"),
    "compress": _compress,
    "cancel a job": lambda scene, http: http.post(f"/v1/compressions/{_job(scene, http)}/cancel"),
    "move": lambda scene, http: _move(http),
    "delete": lambda scene, http: http.delete("/v1/deltas/acme:m"),
    "delete a version": lambda scene, http: http.delete("/v1/deltas/acme:m@1"),
    "create a tenant": lambda scene, http: http.post("/v1/admin/tenants", json={"name": "newcomer"}),
    "limit a tenant": lambda scene, http: http.patch("/v1/admin/tenants/acme", json={"limits": {"max_models": 7}}),
    "delete a tenant": lambda scene, http: http.delete("/v1/admin/tenants/acme"),
    "create a key": lambda scene, http: http.post("/v1/admin/keys", json=NEW_KEY),
    "rotate a key": lambda scene, http: http.post(f"/v1/admin/keys/{scene.keys['acme']}/rotate", json={"grace_s": 9}),
    "revoke a key": lambda scene, http: http.delete(f"/v1/admin/keys/{scene.keys['acme']}"),
}
