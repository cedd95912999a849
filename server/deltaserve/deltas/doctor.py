"""Is the store whole? Every file beside the registry's rows, and every row beside the files.

Nothing that was acknowledged is ever given up: what is damaged is set aside in quarantine/, where it can be looked at;
removed is only what no row names, which a server removes at its start too; rows change where they point to nothing.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from deltaserve.deltas.files import PIECE_BYTES, Files, object_key, part_key, pieces, staged_key
from deltaserve.errors import DeltaLoadFailed
from deltaserve.tenants import checks
from deltaserve.tenants.registry import Registry

Progress = Callable[[str, int, int], None]  # what is read, bytes done, bytes in all
FOREIGN_BITS = stat.S_IWGRP | stat.S_IRWXO  # who is not the server's user: no writing for its group, nothing for others
LITTLE_ROOM_BYTES = 2**28
HEAL = "upload the same file again, roll the name back to a version that is whole, or delete this one"
SHORT = 12  # characters of a digest that are enough to find it


class Severity(enum.StrEnum):
    ERROR = "error"  # something that was acknowledged is not served, or soon will not be
    WARNING = "warning"  # nothing is lost; it should not be so
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """`mend` does what `mends` says. Unless it `heals`, a person must do what `advice` says."""

    severity: Severity
    check: str
    subject: str
    message: str
    advice: str = ""
    mends: str = ""
    mend: Callable[[], object] | None = field(default=None, repr=False)
    keeps_hurting: bool = False

    @property
    def heals(self) -> bool:
        return self.mend is not None and not self.keeps_hurting

    def as_json(self) -> dict[str, Any]:
        told = {"severity": self.severity, "check": self.check, "subject": self.subject, "message": self.message}
        return {**told, "advice": self.advice or None, "repair": self.mends or None}


@dataclass
class Census:
    """What was looked at."""

    tenants: int = 0
    models: int = 0
    versions: int = 0
    objects: int = 0
    object_bytes: int = 0
    parts: int = 0
    files: int = 0  # for jobs
    free_bytes: int | None = None


@dataclass(frozen=True)
class Waiting:
    """Bytes of clients that are not yet what they are for: `table` has them by `id` and digest."""

    folder: str
    called: str
    table: str
    id: str
    key: Callable[[str, str], str]
    fails: str


PARTS = Waiting("parts", "part", "upload_parts", "upload", part_key, "the upload cannot be completed")
STAGED = Waiting("files", "file", "files", "id", staged_key, "a job that is to read it fails")


class Doctor:
    """`root`: the folder of a store that is one. `is_alone`: no server works on it; otherwise it moves under our hands,
    and what is on its way is no finding. Changes nothing until a finding's `mend` is called."""

    def __init__(self, registry: Registry, files: Files, root: Path | None, *, is_alone: bool) -> None:
        self.census = Census()
        self._registry = registry
        self._files = files
        self._root = root
        self._is_alone = is_alone

    def examine(self, progress: Progress, *, digests: bool = True) -> list[Finding]:
        """Worst first. Without `digests`, files are weighed and not read."""
        found = [*self._integrity(), *self._rows(), *self._objects(progress, digests)]
        for kind in (PARTS, STAGED):
            found += self._waiting(kind, progress, digests)
        if self._root is not None:
            found += [*self._leftovers(self._root), *self._access(self._root), *self._room(self._root)]
        order = list(Severity)
        return sorted(found, key=lambda finding: order.index(finding.severity))

    def _integrity(self) -> Iterator[Finding]:
        for problem in self._registry.integrity():
            yield Finding(
                Severity.ERROR, "registry", "registry", problem, "restore the registry from its latest backup"
            )

    def _rows(self) -> Iterator[Finding]:
        for rule in checks.RULES:
            for subject, what, key in self._registry.rows(rule.find):
                worst = Severity.ERROR if rule.is_error else Severity.WARNING
                mend = self._change(rule.mend, *[key] * rule.mend.count("?")) if rule.mend else None
                yield Finding(worst, rule.name, str(subject), rule.says.format(what), "", rule.mends, mend)
        for tenant, holds in checks.over_quota(self._registry):
            advice = "its next upload is refused; raise the limit or delete something"
            yield Finding(Severity.NOTE, "quota", tenant, holds, advice)

    def _objects(self, progress: Progress, digests: bool) -> Iterator[Finding]:
        wanted: dict[str, list[tuple[str, int, bool]]] = defaultdict(list)  # digest → (whose, bytes, is it pointed to?)
        for owner, name, number, digest, size, summary, held in self._registry.rows(VERSIONS):
            wanted[digest].append((f"{owner}:{name}@{number}", size, bool(held)))
            if not _is_summary(summary):
                yield Finding(Severity.ERROR, "summary", f"{owner}:{name}@{number}", "its description cannot be read")
        self.census.versions = sum(map(len, wanted.values()))
        for what, table in (("tenants", "tenants WHERE deleted IS NULL"), ("models", "models")):
            setattr(self.census, what, self._registry.rows(f"SELECT COUNT(*) FROM {table}")[0][0])
        sizes = self._sizes("objects")
        self.census.objects, self.census.object_bytes = len(sizes), sum(sizes.values())
        here, done = set(), 0
        for key, size in sizes.items():
            digest = PurePosixPath(key).stem
            known = wanted.get(digest, []) if key == object_key(digest) else []
            here |= {digest} if known else set()
            if not known:
                yield from self._orphan(key, size, has_rows=bool(wanted))
            elif digests and (found := self._digest(key, progress, done, self.census.object_bytes)) != digest:
                yield self._damaged(key, found, _whose(known))
            elif wrong := [whose for whose, told, _ in known if told != size]:
                change = self._change("UPDATE versions SET bytes = ? WHERE digest = ?", size, digest)
                says = f"the registry has another size than the file's {size} bytes"
                yield Finding(Severity.WARNING, "size", wrong[0], says, mends="write down the true size", mend=change)
            done += size
        for digest in wanted.keys() - here:
            if self._is_alone or self._registry.rows("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", digest):
                yield self._missing(digest, wanted[digest])

    def _missing(self, digest: str, known: list[tuple[str, int, bool]]) -> Finding:
        fails = [whose for whose, _, held in known if held]
        text = f"the bytes of {digest} are gone: " + ("every request for it fails" if fails else "no name points to it")
        return Finding(Severity.ERROR, "object", _whose(known), text, HEAL)

    def _orphan(self, key: str, size: int, *, has_rows: bool) -> Iterator[Finding]:
        if not self._is_alone:  # a request may still use it, or its row is being written
            return
        says = f"{size} bytes that no version names"
        if has_rows:
            mend = _call(self._files.remove, key)
            yield Finding(Severity.WARNING, "orphan", key, says, mends="remove it", mend=mend)
            return
        says += "; the registry has no version at all, and a server removes such files at its start"
        yield Finding(Severity.ERROR, "orphan", key, says, "is it the right registry?", *self._aside(key))

    def _damaged(self, key: str, found: str, whose: str) -> Finding:
        says = f"{key} is damaged: its bytes have {f'the digest {found[:SHORT]}…' if found else 'another digest'}"
        if self._root is None:  # a bucket does not give out what is damaged
            return Finding(Severity.ERROR, "object", whose, says, HEAL)
        return Finding(Severity.ERROR, "object", whose, says, HEAL, *self._aside(key), keeps_hurting=True)

    def _waiting(self, kind: Waiting, progress: Progress, digests: bool) -> Iterator[Finding]:
        rows = self._registry.rows(f"SELECT {kind.id}, digest, bytes FROM {kind.table}")
        wanted = {kind.key(owner, digest): (owner, digest, size) for owner, digest, size in rows}
        sizes = self._sizes(kind.folder)
        setattr(self.census, kind.folder, len(wanted))
        done, total = 0, sum(sizes.values())
        for key, size in sizes.items():
            if key not in wanted:
                if self._is_alone:
                    mend = _call(self._files.remove, key)
                    says = f"{size} bytes of a {kind.called} that the registry does not know"
                    yield Finding(Severity.WARNING, "orphan", key, says, mends="remove it", mend=mend)
                continue
            owner, digest, told = wanted.pop(key)
            if size != told or (digests and self._digest(key, progress, done, total) != digest):
                yield self._lost(kind, owner, digest, f"{key} is damaged", key if self._root else None)
            done += size
        for key, (owner, digest, _) in wanted.items():
            listed = f"SELECT 1 FROM {kind.table} WHERE {kind.id} = ? AND digest = ?"
            if self._is_alone or self._registry.rows(listed, owner, digest):
                yield self._lost(kind, owner, digest, f"{key} is gone", None)

    def _lost(self, kind: Waiting, owner: str, digest: str, says: str, key: str | None) -> Finding:
        unlist = self._change(f"DELETE FROM {kind.table} WHERE {kind.id} = ? AND digest = ?", owner, digest)
        aside, set_aside = self._aside(key) if key else ("", lambda: None)

        def mend() -> None:
            set_aside()
            unlist()

        mends = f"{aside}{', and ' if aside else ''}no longer list it, so that the client sends it again"
        return Finding(Severity.ERROR, kind.called, owner, f"{says}: {kind.fails}", "", mends, mend)

    def _leftovers(self, root: Path) -> Iterator[Finding]:
        incoming = self._files.incoming
        for path in sorted(incoming.iterdir()) if self._is_alone and incoming.is_dir() else ():
            says = f"{path.stat().st_size} bytes of an upload that a crash cut off"
            mend = _call(shutil.rmtree, path) if path.is_dir() else _call(path.unlink)
            yield Finding(Severity.WARNING, "leftover", str(path), says, mends="remove it", mend=mend)
        quarantine = root / "quarantine"
        for path in sorted(quarantine.iterdir()) if quarantine.is_dir() else ():
            says = f"{path.stat().st_size} bytes that an earlier repair set aside"
            yield Finding(Severity.NOTE, "quarantine", str(path), says, "look at it, then remove it")

    def _access(self, root: Path) -> Iterator[Finding]:
        """The folder keeps everybody out, so that what is in it need not; key digests and the audit log are."""
        mode, owner = root.stat().st_mode, root.stat().st_uid
        if mode & FOREIGN_BITS:
            kept = stat.S_IMODE(mode) & ~FOREIGN_BITS
            says = f"mode {stat.S_IMODE(mode):o}: others on this machine get at weights, key digests and the audit log"
            worst = Severity.ERROR if mode & (stat.S_IWGRP | stat.S_IWOTH) else Severity.WARNING
            mend = _call(root.chmod, kept)
            yield Finding(worst, "access", str(root), says, "", f"make it {kept:o}", mend)
        for path in sorted(root.rglob("*")):
            if path.lstat().st_uid != owner:
                says = "belongs to another user than the store: its server may not be able to change it"
                give = _call(shutil.chown, path, owner) if os.geteuid() == 0 else None
                yield Finding(Severity.ERROR, "access", str(path), says, "", f"give it to user {owner}", give)

    def _room(self, root: Path) -> Iterator[Finding]:
        free = self.census.free_bytes = shutil.disk_usage(root).free
        inodes = os.statvfs(root)
        if free < LITTLE_ROOM_BYTES:
            says = f"{free} bytes are free: uploads are or soon will be refused (507)"
            yield Finding(Severity.ERROR, "room", str(root), says, "make room; nothing else need be done")
        if inodes.f_files and inodes.f_favail < 1000:
            says = f"{inodes.f_favail} inodes are free: uploads are or soon will be refused (507)"
            yield Finding(Severity.ERROR, "room", str(root), says, "make room; nothing else need be done")

    def _sizes(self, prefix: str) -> dict[str, int]:
        found = {}
        for key in self._files.keys(prefix):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                found[key] = self._files.size(key)
        return found

    def _digest(self, key: str, progress: Progress, before: int, total: int) -> str:
        """Empty for bytes that the bucket's reader refuses; what was removed meanwhile is not damaged."""
        digest = hashlib.sha256()
        try:
            with self._files.reading(key) as path, path.open("rb") as file:
                for piece in pieces(file):
                    digest.update(piece)
                    before += len(piece)
                    progress(key, before, total)
        except DeltaLoadFailed:
            return ""
        except FileNotFoundError:
            if self._is_alone:
                raise
            return PurePosixPath(key).stem
        return digest.hexdigest()

    def _aside(self, key: str) -> tuple[str, Callable[[], None]]:
        """What to say, and what to do: a file moves to quarantine/, whole before it leaves its place."""
        target = f"quarantine/{key.replace('/', '-')}"

        def move() -> None:
            descriptor, copy = tempfile.mkstemp(dir=self._files.incoming)
            with self._files.reading(key) as path, path.open("rb") as source, os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(source, file, PIECE_BYTES)
                file.flush()
                os.fsync(descriptor)
            self._files.put(target, Path(copy))
            self._files.remove(key)

        return f"set it aside as {target}", move

    def _change(self, sql: str, *values: Any) -> Callable[[], None]:
        def write() -> None:
            with self._registry.write() as db:
                db.execute(sql, values)

        return write


VERSIONS = """
SELECT t.name, m.name, v.version, v.digest, v.bytes, v.summary,
       CASE WHEN v.version = m.active OR v.version = m.canary THEN 1 ELSE 0 END
FROM versions v JOIN models m ON m.id = v.model JOIN tenants t ON t.id = m.tenant
"""


def _is_summary(text: str) -> bool:
    try:
        return {"codec", "disk_bytes", "resident_bytes", "base"} <= set(json.loads(text))
    except (ValueError, TypeError):
        return False


def _whose(known: list[tuple[str, int, bool]]) -> str:
    """The versions of a file, those that names point to first."""
    names = [whose for whose, _, _ in sorted(known, key=lambda one: not one[2])]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _call(function: Callable[..., object], *values: Any) -> Callable[[], object]:
    return lambda: function(*values)
