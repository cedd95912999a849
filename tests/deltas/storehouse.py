"""A store with its registry, and short ways to ask it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.s3 import S3Files
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.accounts import Caller, Tenant
from deltaserve.tenants.models import ALWAYS, Condition, Version
from deltaserve.tenants.postgres import PostgresRegistry
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.tenants.registry import Registry


ME = Caller(Tenant(1, "default", 0), "-", frozenset())


class Store(DeltaStore):
    """A store with the registry it works on, and short ways to ask it as its first tenant."""

    def __init__(self, root: Path, shared: tuple[str, str] | None = None, **options: Any) -> None:
        """`shared`: URLs of a registry and a bucket that other servers have too."""
        if shared is None:
            self.registry: Registry = SqliteRegistry(root)
            files: Any = LocalFiles(root)
        else:
            self.registry = PostgresRegistry(shared[0])
            files = S3Files(shared[1], root, 1 << 20, self.registry.identity())
        super().__init__(self.registry, files, **options)

    def kept(self) -> set[str]:
        """The objects that are left when all has gone that may."""
        if self.registry.is_shared:
            with self.registry.write() as db:
                db.execute("UPDATE removals SET due = 0")
            self.sweep()
        return {key.rpartition("/")[2].removesuffix(".safetensors") for key in self.files.keys("objects")}

    def put(self, name: str, data: bytes, condition: Condition = ALWAYS, **summary: Any) -> tuple[Version, bool]:
        upload = self.begin_upload(1 << 20)
        try:
            upload.write(data)
            stored = self.commit(
                Destination(ME.tenant, name, "test", True, condition), upload, upload.finish(None), summary
            )
            return stored.version, stored.is_new_name
        finally:
            upload.close()

    def get(self, name: str) -> Version:
        return self.models.find(ME, name)[0].active

    def all(self) -> list[tuple[str, Version]]:
        return [(model.name, model.active) for model in self.models.visible(ME)]

    def path(self, digest: DeltaDigest) -> Path:
        with self.reading(digest) as path:
            return path

    def remove(self, name: str) -> None:
        self.delete(ME, name)

    def close(self) -> None:
        self.registry.close()
        if isinstance(self.files, S3Files):
            self.files.close()


def objects(root: Path) -> set[str]:
    return {path.stem for path in (root / "objects").glob("*/*")}


def incoming(root: Path) -> list[Path]:
    return list((root / "incoming").iterdir())


def digest_of(data: bytes) -> DeltaDigest:
    return DeltaDigest(hashlib.sha256(data).hexdigest())
