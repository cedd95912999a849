"""An upload is checked whole before a name points to it; what is refused leaves nothing."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.intake import BEHIND, Intake, upload_pool
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.errors import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactMismatch,
    ArtifactNotFinite,
    ArtifactTooLarge,
    BaseMismatch,
    DeltaServeError,
    DigestMismatch,
    InvalidName,
    TemplateError,
)
from deltaserve.tenants.accounts import Accounts, Caller
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module", params=[False, True], ids=["named", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def good_file(packed: bool, tiny_base: Path, tiny_finetune: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that fits."""
    from deltaserve.codecs.registry import make_codec
    from deltaserve.deltas.compress import compress

    path = tmp_path_factory.mktemp("good") / "delta.safetensors"
    compress(Checkpoint.open(tiny_base), Checkpoint.open(tiny_finetune), make_codec("bitdelta"), path, packed=packed)
    return path


@pytest.fixture(scope="module")
def good(good_file: Path) -> bytes:
    return good_file.read_bytes()


class Door:
    def __init__(self, root: Path, base: Path, *checks: Callable[[Artifact], None], max_bytes: int = 1 << 24) -> None:
        self.root = root
        self.registry = SqliteRegistry(root)
        self.store = DeltaStore(self.registry, LocalFiles(root))
        self.me = Caller(Accounts(self.registry).default, "-", frozenset())
        self.intake = Intake(self.store, Checkpoint.open(base), list(checks), max_bytes)

    def send(self, data: bytes, name: str = "a", sha256: str | None = None) -> Any:
        upload = self.intake.begin(self.intake.max_bytes)
        try:
            upload.write(data)
            return self.intake.accept(Destination(self.me.tenant, name, "test"), upload, sha256)
        finally:
            upload.close()

    def files(self) -> list[Path]:
        return [
            path for folder in ("objects", "incoming") for path in (self.root / folder).rglob("*") if path.is_file()
        ]


@pytest.fixture
def door(tmp_path: Path, tiny_base: Path) -> Iterator[Door]:
    made = Door(tmp_path, tiny_base)
    yield made
    made.registry.close()


def test_a_good_upload_is_a_version_with_its_sizes(door: Door, good: bytes) -> None:
    stored = door.send(good)
    record = stored.version
    with door.store.reading(record.digest) as path:
        artifact = Artifact.open(path)
    assert (record.number, stored.is_new_name) == (1, True)
    assert record.summary == {
        "codec": "bitdelta",
        "disk_bytes": len(good),
        "resident_bytes": artifact.resident_bytes,
        "bits_per_parameter": round(artifact.bits_per_parameter, 6),
        "base": artifact.manifest.base.fingerprint,
    }
    assert len(door.files()) == 1


def damaged(good: Path, how: str, files: Any) -> bytes:
    raw, entries = good.read_bytes(), Artifact.open(good).entries
    header, data = files.split(raw)
    match how:
        case "empty":
            return b""
        case "cut":
            return raw[:-1]
        case "no manifest":
            header["__metadata__"] = {}
        case "manifest":
            header["__metadata__"]["deltaserve"] = "{}"
        case "nan":
            start = entries["model.norm.weight"].start
            return raw[:start] + b"\xff\xff" + raw[start + 2 :]
        case "renamed":
            text = files.manifest_text(header).replace("layers.1.", "layers.9.")
            header["__metadata__"]["deltaserve"] = text
            header = {name.replace("layers.1.", "layers.9."): entry for name, entry in header.items()}
    return bytes(files.join(header, data))


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("empty", ArtifactCorrupt),
        ("cut", ArtifactCorrupt),
        ("no manifest", ArtifactError),
        ("manifest", ArtifactError),
        ("nan", ArtifactNotFinite),
        ("renamed", ArtifactMismatch),
    ],
)
def test_a_bad_upload_is_refused_by_its_fault_and_leaves_nothing(
    door: Door, good_file: Path, files: Any, how: str, error: type[DeltaServeError]
) -> None:
    with pytest.raises(error):
        door.send(damaged(good_file, how, files))
    assert (door.files(), door.store.models.visible(door.me)) == ([], [])


def test_a_refused_upload_leaves_the_version_that_was_there(door: Door, good: bytes) -> None:
    record = door.send(good).version
    with pytest.raises(ArtifactCorrupt):
        door.send(good[:-1])
    assert door.store.models.find(door.me, "a")[0].active == record
    assert len(door.files()) == 1


def test_a_delta_of_another_base_is_refused(tmp_path: Path, untied_base: Path, good: bytes) -> None:
    door = Door(tmp_path, untied_base)
    with pytest.raises(BaseMismatch):
        door.send(good)
    assert door.files() == []
    door.registry.close()


def test_a_bad_name_or_digest_leaves_nothing(door: Door, good: bytes) -> None:
    with pytest.raises(InvalidName):
        door.send(good, name="../a")
    with pytest.raises(DigestMismatch):
        door.send(good, sha256="0" * 64)
    assert door.files() == []


def test_what_is_larger_than_allowed_leaves_nothing(tmp_path: Path, tiny_base: Path, good: bytes) -> None:
    door = Door(tmp_path, tiny_base, max_bytes=len(good) - 1)
    with pytest.raises(ArtifactTooLarge):
        door.send(good)
    assert door.files() == []
    door.registry.close()


def test_what_the_serving_side_refuses_leaves_nothing(tmp_path: Path, tiny_base: Path, good: bytes) -> None:
    def refuse(artifact: Artifact) -> None:
        raise TemplateError(f"no template of {artifact.manifest.codec}")

    door = Door(tmp_path, tiny_base, refuse)
    with pytest.raises(TemplateError):
        door.send(good)
    assert (door.files(), door.store.models.visible(door.me)) == ([], [])
    door.registry.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_uploads_come_after_everything_else_that_wants_the_cores() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with upload_pool(1) as pool:
        found = pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
    assert (found, os.getpriority(os.PRIO_PROCESS, 0)) == (BEHIND, before)
