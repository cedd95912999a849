"""Files that wait for a job, on disk: whole or not at all, and gone when nobody waits for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from deltaserve.deltas.files import LocalFiles
from deltaserve.deltas.staging import Staging, check_filename
from deltaserve.deltas.store import DeltaStore
from deltaserve.errors import (
    ArtifactTooLarge,
    BadRequest,
    CheckpointError,
    DigestMismatch,
    FileInUse,
    InvalidName,
    NotFound,
    QuotaExceeded,
)
from deltaserve.tenants.accounts import Accounts, Caller, Scope
from deltaserve.tenants.files import FOR_A_JOB, MAX_FILES, StagedFile
from deltaserve.tenants.jobs import Asked, Jobs
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXPIRES_S = 100


class Shelf:
    """Files of the tenant acme, by a clock that stands still."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 1_700_000_000
        self.open()
        self.acme = self.accounts.create("acme", "test")
        self.me = Caller(self.acme, "k", frozenset({Scope.MANAGE}))

    def open(self) -> None:
        self.registry = SqliteRegistry(self.root)
        self.accounts = Accounts(self.registry)
        self.store = DeltaStore(self.registry, LocalFiles(self.root))
        self.staging = Staging(self.registry, self.store, expires_s=EXPIRES_S, clock=lambda: self.now)
        self.jobs = Jobs(self.registry, lambda: self.now)

    def keep(self, filename: str, data: bytes = b"{}", sha256: str | None = None) -> StagedFile:
        upload = self.store.begin_upload(2**40)
        try:
            upload.write(data)
            return self.staging.keep(self.acme, filename, FOR_A_JOB, upload, sha256)
        finally:
            upload.close()

    def on_disk(self) -> list[str]:
        return sorted(path.name for path in (self.root / "files").rglob("*") if path.is_file())


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    made = Shelf(tmp_path)
    yield made
    made.registry.close()


def test_a_file_is_laid_out_under_its_name_and_survives_a_restart(shelf: Shelf, tmp_path: Path) -> None:
    files = [shelf.keep("config.json", b'{"a": 1}'), shelf.keep("chat_template.jinja", b"x")]
    (shelf.root / "files" / "file-0").mkdir()
    (shelf.root / "files" / "file-0" / ("0" * 64)).write_bytes(b"a crash came before its row")
    shelf.registry.close()
    shelf.open()
    assert shelf.on_disk() == sorted(file.sha256 for file in files)
    with shelf.staging.scratch() as scratch, shelf.staging.laid_out(files, scratch / "model" / "m") as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            "config.json": b'{"a": 1}',
            "chat_template.jinja": b"x",
        }
    assert not scratch.exists()
    with pytest.raises(BadRequest, match="two of the files"), shelf.staging.laid_out([files[0]] * 2, tmp_path / "x"):
        pass


@pytest.mark.parametrize(
    "filename",
    ["", "a", ".json", "a.bin", "a.pt", "a.py", "../a.json", "a/b.json", "a\n.json", f"{'a' * 255}.json", "ä.json"],
)
def test_other_names_are_refused(filename: str) -> None:
    with pytest.raises(InvalidName):
        check_filename(filename)


def test_what_is_refused_leaves_nothing(shelf: Shelf) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    for filename, data, kind in (
        ("model.safetensors", b"PK\x03\x04", CheckpointError),
        ("model.safetensors", len(header).to_bytes(8, "little") + header + b"short", CheckpointError),
        ("chat_template.jinja", bytes(2**20 + 1), ArtifactTooLarge),
        ("config.json", bytes(16 * 2**20 + 1), ArtifactTooLarge),
    ):
        with pytest.raises(kind) as caught:
            shelf.keep(filename, data)
        assert filename in caught.value.message
    with pytest.raises(DigestMismatch):
        shelf.keep("config.json", sha256="0" * 64)
    shelf.accounts.limit(shelf.acme, {"max_bytes": 5}, "test")
    shelf.acme = shelf.accounts.named("acme")
    shelf.keep("config.json", b"{}")
    with pytest.raises(QuotaExceeded):
        shelf.keep("config.json", b'{"": 1}')
    assert len(shelf.on_disk()) == 1 and list((shelf.root / "incoming").iterdir()) == []
    whole = len(header).to_bytes(8, "little") + header + bytes(16)
    shelf.accounts.limit(shelf.acme, {"max_bytes": None}, "test")
    shelf.acme = shelf.accounts.named("acme")
    assert shelf.keep("model.safetensors", whole).num_bytes == len(whole)


def test_what_no_job_waits_for_expires(shelf: Shelf) -> None:
    kept, lost = shelf.keep("config.json"), shelf.keep("tokenizer.json", b"[]")
    job = shelf.jobs.add(shelf.acme, "test", Asked("m", [kept.id], {}, {}, True), None)
    shelf.now += EXPIRES_S
    shelf.staging.sweep()
    assert shelf.on_disk() == [kept.sha256]
    with pytest.raises(NotFound):
        shelf.staging.rows.find(shelf.me, lost.id)
    with pytest.raises(FileInUse):
        shelf.staging.delete(shelf.me, kept.id)
    shelf.jobs.cancel(job, "test")
    shelf.staging.delete(shelf.me, kept.id)
    assert shelf.on_disk() == []


def test_a_file_that_two_jobs_read_goes_with_the_second(shelf: Shelf) -> None:
    file = shelf.keep("config.json")
    jobs = [shelf.jobs.add(shelf.acme, "test", Asked(name, [file.id], {}, {}, True), None) for name in "ab"]
    for job, gone in zip(jobs, ([], [file]), strict=True):
        with shelf.registry.write():
            shelf.jobs.cancel(job, "test")
            assert shelf.staging.forget(job) == gone
        shelf.staging.drop(gone)
    assert shelf.on_disk() == []


def test_files_are_bounded_in_number(shelf: Shelf) -> None:
    row = "('file-' || ?, ?, 'config.json', 'user_data', 0, '', 0, ?)"
    with shelf.registry.write() as db:
        for number in range(MAX_FILES):
            db.execute(f"INSERT INTO files VALUES {row}", (str(number), shelf.acme.id, shelf.now + 1))
    with pytest.raises(QuotaExceeded, match="files"):
        shelf.keep("config.json")
