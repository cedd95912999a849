"""A process that is killed before any one of its writes leaves the state of before or after, never one between."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.parts import PartStore
from deltaserve.deltas.store import DeltaStore
from deltaserve.tenants.accounts import Accounts, Caller, Scope
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.limits import Gate
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# For each line: a process that does one thing, and dies by SIGKILL before its nth write, if there are as many.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.parts import PartStore
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.tenants.accounts import Accounts, Caller, Scope
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.limits import Gate
from deltaserve.tenants.models import Canary, Change
from deltaserve.tenants.sqlite import SqliteRegistry

def work(root, what, fatal):
    steps = 0
    registry = SqliteRegistry(root)
    accounts = Accounts(registry)
    keys = Keys(registry, accounts, "first")
    store = DeltaStore(registry, LocalFiles(root), keep_versions=2)
    acme = accounts.named("acme")
    me = Caller(acme, "k", frozenset({Scope.MANAGE}))
    now = time.time()
    parts = PartStore(registry, accounts, store, lambda to, file, sha256, also: store.commit(
        to, file, file.finish(sha256), {}, also), Gate(), stage=None, expires_s=100, clock=lambda: now)
    uploads = {upload.filename: upload for upload in parts.uploads.all_pending()}

    def step():
        nonlocal steps
        steps += 1
        if steps == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call):
        def run(*args, **more):
            step()
            return call(*args, **more)
        return run

    class Connection:
        def __init__(self, true):
            self.true = true
        def execute(self, sql, *values):
            if not sql.lstrip().startswith("SELECT"):
                step()
            return self.true.execute(sql, *values)

    registry._connection = Connection(registry._connection)
    os.replace = counted(os.replace)
    os.fsync = counted(os.fsync)
    for name in ("unlink", "mkdir", "rmdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    match what:
        case "upload":
            upload = store.begin_upload(100)
            upload.write(b"three")
            store.commit(Destination(acme, "m", "test"), upload, upload.finish(None), {})
            upload.close()
        case "part" | "first part":
            to, data = (uploads["half"], b"yz") if what == "part" else (uploads["empty"], b"a")
            with parts.receiving(to):
                file = parts.begin(to)
                file.write(data)
                parts.keep(to, file)
                file.close()
        case "complete":
            whole = uploads["whole"]
            parts.complete(me, whole.id, [part.id for part in parts.uploads.parts(whole)], md5=None, sha256=None)
        case "cancel":
            parts.cancel(me, uploads["whole"].id)
        case "expire":
            now += 101
            parts.sweep()
        case "move":
            store.change(me, "m", Change(version=1, canary=Canary(2, 50), pinned=True, shared_with=[accounts.default]))
        case "delete":
            store.delete(me, "m")
        case "delete version":
            store.delete(me, "m@1")
        case "delete tenant":
            parts.cancel_all(acme)
            store.delete_all(acme, "test")
            accounts.delete(acme, "test")
        case "rotate":
            keys.rotate(keys.all(acme)[0], "test")
        case "limit":
            accounts.limit(acme, {"max_models": 7}, "test")
    return steps

for line in sys.stdin:
    root, what, fatal = json.loads(line)
    child = os.fork()
    if not child:
        os.write(1, b"%d\\n" % work(Path(root), what, fatal))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.write(1, b"ended %d\\n" % os.waitstatus_to_exitcode(status))
"""


def build(root: Path) -> None:
    from deltaserve.deltas.store import Destination

    registry = SqliteRegistry(root)
    accounts = Accounts(registry)
    keys, store = Keys(registry, accounts, "first"), DeltaStore(registry, LocalFiles(root), keep_versions=2)
    parts = PartStore(registry, accounts, store, Refuse(), Gate(), stage=Refuse(), expires_s=100)
    acme = accounts.create("acme", "test")
    keys.create(acme, [Scope.MANAGE], "test")
    for data in (b"one", b"two"):
        upload = store.begin_upload(100)
        upload.write(data)
        store.commit(Destination(acme, "m", "test"), upload, upload.finish(None), {})
        upload.close()
    for filename, num_bytes, data in (("whole", 5, (b"th", b"ree")), ("half", 3, (b"x",)), ("empty", 1, ())):
        pending = parts.create(Destination(acme, "m", "test"), filename=filename, purpose="", num_bytes=num_bytes)
        for piece in data:
            with parts.receiving(pending):
                upload = parts.begin(pending)
                upload.write(piece)
                parts.keep(pending, upload)
                upload.close()
    registry.close()


class Refuse:
    """Nothing is completed here."""

    def __call__(self, *args: Any) -> Any:
        raise AssertionError(args)


def look(root: Path) -> dict[str, Any]:
    """What the registry says, after a restart; and that the files are those it names, whole."""
    registry = SqliteRegistry(root)
    accounts = Accounts(registry)
    keys, store = Keys(registry, accounts, "first"), DeltaStore(registry, LocalFiles(root), keep_versions=2)
    admin = Caller(accounts.default, "k", frozenset({Scope.ADMIN}))
    state: dict[str, Any] = {"tenants": [tenant.name for tenant in accounts.all()]}
    state["limits"] = [tenant.limits.given() for tenant in accounts.all()]
    state["keys"] = sorted(key.is_valid(2**40) for key in keys.all())
    state["models"] = []
    named = set()
    for model in store.models.visible(admin):
        versions = store.models.versions(model)
        named |= {version.digest for version in versions}
        pointers = (model.active.number, model.canary and vars(model.canary), model.pinned, model.shared_with)
        state["models"].append((model.owner, model.name, pointers, [version.number for version in versions]))
    parts = PartStore(registry, accounts, store, Refuse(), Gate(), stage=Refuse(), expires_s=100)
    state["uploads"] = []
    for key, filename in registry.rows("SELECT id, filename FROM uploads ORDER BY filename DESC"):
        pending = parts.uploads.find(admin, key)
        here = sorted(part.sha256 for part in parts.uploads.parts(pending))
        folder = root / "parts" / key
        assert folder.exists() == bool(here)
        for digest in here:
            assert hashlib.sha256((folder / digest).read_bytes()).hexdigest() == digest
        assert len(list(folder.glob("*"))) == len(here), "no orphans among the parts either"
        state["uploads"].append((filename, pending.status, here))
    state["log"] = [(entry.action, entry.object.partition("/")[0]) for entry in registry.audit_log()]
    files = list((root / "objects").glob("*/*"))
    assert {path.stem for path in files} == named, "no orphans, and nothing is missing"
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in files)
    assert list((root / "incoming").iterdir()) == []
    registry.close()
    return json.loads(json.dumps(state))  # type: ignore[no-any-return]


def between(before: dict[str, Any], after: dict[str, Any]) -> list[Any]:
    """Uploads of which some are as before and some as after."""
    return [list(mixed) for mixed in itertools.product(*zip(before["uploads"], after["uploads"], strict=True))]


class Workshop:
    """One process that has imported everything, and forks for each task."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", CHILD]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, root: Path, what: str, fatal: int) -> tuple[list[str], int]:
        """(what it printed, its exit status)"""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(root), what, fatal]) + "\n")
        self.process.stdin.flush()
        printed = []
        for line in iter(self.process.stdout.readline, ""):
            if line.startswith("ended "):
                return printed, int(line.split()[1])
            printed.append(line.strip())
        raise AssertionError("the workshop is gone")


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    made = Workshop()
    with made.process:
        yield made


@pytest.mark.parametrize(
    "what",
    [
        "upload",
        "part",
        "first part",
        "complete",
        "cancel",
        "expire",
        "move",
        "delete",
        "delete version",
        "delete tenant",
        "rotate",
        "limit",
    ],
)
def test_a_kill_before_any_write_leaves_the_state_before_or_after(
    workshop: Workshop, tmp_path: Path, what: str
) -> None:
    (tmp_path / "whole").mkdir()
    build(tmp_path / "whole")
    before = look(tmp_path / "whole")
    (steps,), status = workshop.run(tmp_path / "whole", what, 0)
    assert status == 0
    after = look(tmp_path / "whole")
    assert before != after and int(steps) >= 3
    allowed = [before, after]
    if what == "delete tenant":  # its models go first, and a tenant without any is as good as it was
        models = {**after, "tenants": before["tenants"], "limits": before["limits"], "keys": before["keys"]}
        allowed += [models, *({**before, "uploads": uploads} for uploads in between(before, after))]
    if what == "expire":  # one after the other
        allowed += [{**before, "uploads": uploads} for uploads in between(before, after)]
    if what == "rotate":  # the new key comes first: rather two than none
        allowed.append({**before, "keys": [*before["keys"], True]})
    for fatal in range(1, int(steps) + 1):
        root = tmp_path / str(fatal)
        root.mkdir()
        build(root)
        assert workshop.run(root, what, fatal) == ([], -9)
        found = look(root)
        assert any({**found, "log": None} == {**one, "log": None} for one in allowed), (fatal, found)
        if {**found, "log": None} == {**before, "log": None}:
            assert found["log"] == before["log"], "what did not happen is not in the log"
        elif {**found, "log": None} == {**after, "log": None}:
            assert found["log"] == after["log"], "what happened is"
