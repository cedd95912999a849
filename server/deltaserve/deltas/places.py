"""Where the registry and the files are: both in one directory of this server, or in a database and a bucket that
servers share."""

from __future__ import annotations

from pathlib import Path

from deltaserve.deltas.files import Files, LocalFiles
from deltaserve.deltas.s3 import S3Files
from deltaserve.errors import BadRequest, IncompatibleStore
from deltaserve.tenants.postgres import PostgresRegistry
from deltaserve.tenants.registry import Registry
from deltaserve.tenants.sqlite import SqliteRegistry

IN_BUCKET, IN_DATABASE = "s3://", ("postgresql://", "postgres://")


def open_places(store: str, registry: str | None, cache: Path, cache_bytes: int) -> tuple[Registry, Files]:
    """`store`: a directory, or s3://BUCKET/PREFIX with `cache`; `registry`: postgresql://…, with the latter alone:
    servers that share one of them and not the other would not find each other's files. Raises BadRequest, StoreInUse,
    IncompatibleStore, RegistryUnavailable, StoreUnavailable."""
    if registry is not None and not registry.startswith(IN_DATABASE):
        raise BadRequest("--registry is postgresql://USER@HOST/DATABASE; without it, it is a file in --store")
    if (registry is not None) != store.startswith(IN_BUCKET):
        raise BadRequest("--registry postgresql://… and --store s3://… go together: servers share both, or none")
    if registry is None:
        root = Path(store)
        _check_not_orphaned(root)
        return SqliteRegistry(root), LocalFiles(root)
    opened = PostgresRegistry(registry)
    try:
        return opened, S3Files(store, cache, cache_bytes, opened.identity())
    except BaseException:
        opened.close()
        raise


def _check_not_orphaned(root: Path) -> None:
    """A new registry would call every object unused, and the start would remove them."""
    objects = root / "objects"
    if not (root / "registry.sqlite").exists() and objects.is_dir() and any(objects.glob("*/*")):
        raise IncompatibleStore(
            f"{root} has objects and no registry.sqlite, which says whose they are: put it back from a backup, or move "
            f"{objects} away to begin anew"
        )
