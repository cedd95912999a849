"""`deltaserve doctor` finds each thing that is not as it should be, mends what can be mended, and loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve import cli
from deltaserve.deltas.files import LocalFiles, object_key, part_key, staged_key
from deltaserve.deltas.parts import PartStore
from deltaserve.deltas.places import open_places
from deltaserve.deltas.staging import Staging
from deltaserve.deltas.store import DeltaStore, Destination
from deltaserve.tenants.accounts import Accounts, Scope
from deltaserve.tenants.files import FOR_A_JOB
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.limits import Gate, Limits
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from pathlib import Path

HEALTHY, MENDABLE, BEYOND_REPAIR = 0, 3, 4
SUMMARY = {"codec": "x", "disk_bytes": 3, "resident_bytes": 3, "base": "b"}


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Clinic:
    """A store of acme's m (one, two, three), globex' m (two), an upload with a part and a file for a job, and the
    doctor."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self._capsys = capsys
        registry = SqliteRegistry(root)
        accounts = Accounts(registry)
        store = DeltaStore(registry, LocalFiles(root), keep_versions=3)
        parts = PartStore(registry, accounts, store, store.commit, Gate(), stage=None, expires_s=100)  # type: ignore[arg-type]
        for tenant, files in (("acme", (b"one", b"two", b"three")), ("globex", (b"two",))):
            owner = accounts.create(tenant, "test", Limits(max_models=9))
            Keys(registry, accounts, "first").create(owner, [Scope.INFERENCE], "test")
            for data in files:
                upload = store.begin_upload(100)
                upload.write(data)
                store.commit(Destination(owner, "m", "test"), upload, upload.finish(None), SUMMARY)
                upload.close()
        pending = parts.create(Destination(accounts.named("acme"), "m", "t"), filename="f", purpose="", num_bytes=9)
        with parts.receiving(pending):
            upload = parts.begin(pending)
            upload.write(b"part")
            parts.keep(pending, upload)
            upload.close()
        self.upload = pending.id
        upload = store.begin_upload(100)
        upload.write(b"{}")
        staging = Staging(registry, store, expires_s=100)
        self.staged = staging.keep(accounts.named("acme"), "config.json", FOR_A_JOB, upload, None).id
        upload.close()
        registry.close()

    def object(self, data: bytes) -> Path:
        return self.root / object_key(digest_of(data))

    def part(self, data: bytes = b"part") -> Path:
        return self.root / part_key(self.upload, digest_of(data))

    def file(self) -> Path:
        return self.root / staged_key(self.staged, digest_of(b"{}"))

    def sql(self, *statements: str) -> None:
        connection = sqlite3.connect(self.root / "registry.sqlite")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()

    def rows(self, sql: str) -> list[Any]:
        connection = sqlite3.connect(self.root / "registry.sqlite")
        found = connection.execute(sql).fetchall()
        connection.close()
        return found

    def doctor(self, *flags: str) -> tuple[int, dict[str, Any]]:
        """(exit status, what it says)"""
        status = cli.main(["doctor", "--store", str(self.root), "--json", *flags])
        out = self._capsys.readouterr()
        assert out.out, out.err
        return status, json.loads(out.out)

    def finds(self, *flags: str) -> tuple[int, list[tuple[str, str, str]]]:
        status, told = self.doctor(*flags)
        return status, [(one["severity"], one["check"], one["subject"]) for one in told["findings"]]

    def every_file(self) -> dict[str, bytes]:
        """But for the database, whose pages move, and the lock."""
        files = [path for path in self.root.rglob("*") if path.is_file() and path.parent != self.root]
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def clinic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Clinic:
    return Clinic(tmp_path / "store", capsys)


def test_a_store_as_the_server_leaves_it_is_healthy(clinic: Clinic) -> None:
    before = clinic.every_file()
    for flags in ((), ("--quick",), ("--online",), ("--repair",)):
        status, told = clinic.doctor(*flags)
        assert (status, told["findings"], told["mended"]) == (HEALTHY, [], [])
    counts = {key: told["looked_at"][key] for key in ("tenants", "models", "versions", "objects", "parts", "files")}
    assert counts == {"tenants": 3, "models": 2, "versions": 4, "objects": 3, "parts": 1, "files": 1}
    assert clinic.every_file() == before


def test_damaged_bytes_are_set_aside_and_whose_they_were_is_told(clinic: Clinic) -> None:
    clinic.object(b"three").write_bytes(b"thr3e")
    wanted = ("error", "object", "acme:m@3")
    assert clinic.finds() == (BEYOND_REPAIR, [wanted])
    assert clinic.finds("--quick") == (HEALTHY, []), "as many bytes as before"
    status, told = clinic.doctor("--repair")
    key = object_key(digest_of(b"three"))
    aside = clinic.root / "quarantine" / key.replace("/", "-")
    assert aside.read_bytes() == b"thr3e" and not clinic.object(b"three").exists()
    assert [one["subject"] for one in told["mended"]] == ["acme:m@3"]
    assert (status, [one["check"] for one in told["findings"]]) == (BEYOND_REPAIR, ["object", "quarantine"])
    assert "every request for it fails" in told["findings"][0]["message"]
    assert clinic.finds()[0] == BEYOND_REPAIR


def test_bytes_that_several_versions_share_are_theirs_all(clinic: Clinic) -> None:
    clinic.object(b"two").unlink()
    assert clinic.finds() == (BEYOND_REPAIR, [("error", "object", "globex:m@1, acme:m@2")])


def test_what_nobody_names_is_removed(clinic: Clinic) -> None:
    before = clinic.every_file()
    staged = clinic.root / "files" / "file-0" / "0"
    for left in (clinic.object(b"orphan"), clinic.part(b"lost"), staged, clinic.root / "incoming" / "tmpx"):
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"left")
    (clinic.root / "objects" / "zz").mkdir()
    (clinic.root / "objects" / "zz" / "stray").write_bytes(b"?")
    status, found = clinic.finds()
    assert (status, sorted(check for _, check, _ in found)) == (MENDABLE, ["leftover", *["orphan"] * 4])
    assert clinic.finds("--online") == (HEALTHY, []), "a server may be writing them"
    assert clinic.finds("--repair") == (HEALTHY, [])
    assert clinic.every_file() == before


def test_the_files_of_another_registry_are_not_removed(clinic: Clinic) -> None:
    for name in ("registry.sqlite", "registry.sqlite-wal", "registry.sqlite-shm"):
        (clinic.root / name).unlink(missing_ok=True)
    for folder in ("parts", "files"):
        shutil.rmtree(clinic.root / folder)
    SqliteRegistry(clinic.root).close()
    status, told = clinic.doctor()
    assert (status, [one["severity"] for one in told["findings"]]) == (MENDABLE, ["error"] * 3)
    assert "is it the right registry?" in told["findings"][0]["advice"]
    clinic.doctor("--repair")
    kept = sorted(path.read_bytes() for path in (clinic.root / "quarantine").iterdir())
    assert kept == [b"one", b"three", b"two"]


@pytest.mark.parametrize("damage", ["gone", "other bytes", "cut off"])
def test_a_part_that_is_lost_is_not_listed_any_more(clinic: Clinic, damage: str) -> None:
    if damage == "gone":
        clinic.part().unlink()
    else:
        clinic.part().write_bytes(b"p4rt" if damage == "other bytes" else b"pa")
    assert clinic.finds() == (MENDABLE, [("error", "part", clinic.upload)])
    assert clinic.finds("--repair")[0] == HEALTHY
    assert clinic.rows("SELECT * FROM upload_parts") == []
    assert (clinic.root / "quarantine").exists() == (damage != "gone")


@pytest.mark.parametrize("damage", ["gone", "other bytes"])
def test_a_file_for_a_job_that_is_lost_is_not_listed_any_more(clinic: Clinic, damage: str) -> None:
    if damage == "gone":
        clinic.file().unlink()
    else:
        clinic.file().write_bytes(b"[]")
    assert clinic.finds() == (MENDABLE, [("error", "file", clinic.staged)])
    assert clinic.finds("--repair")[0] == HEALTHY
    assert clinic.rows("SELECT * FROM files") == [] and len(clinic.rows("SELECT * FROM upload_parts")) == 1
    assert (clinic.root / "quarantine").exists() == (damage != "gone")


ACME = "model = (SELECT id FROM models WHERE tenant = (SELECT id FROM tenants WHERE name = 'acme'))"
IS_ACME = "tenant = (SELECT id FROM tenants WHERE name = 'acme')"
GONE = "UPDATE tenants SET deleted = 1 WHERE name = 'globex'"
DAYS = """INSERT INTO usage (tenant, tenant_name, model, day, requests, prompt_tokens, completion_tokens)
VALUES ({}, 'acme', 'm', '2026-01-01', {}, 0, 0)"""
ROWS: list[tuple[str, tuple[str, ...], tuple[str, str, str], str, Any]] = [
    (
        "a name that points to no version",
        (f"UPDATE models SET active = 8 WHERE {IS_ACME}",),
        ("error", "pointer", "acme:m"),
        f"SELECT active FROM models WHERE {IS_ACME}",
        3,
    ),
    (
        "a canary that points to no version",
        (f"UPDATE models SET canary = 8, canary_percent = 5 WHERE {IS_ACME}",),
        ("error", "pointer", "acme:m"),
        f"SELECT canary FROM models WHERE {IS_ACME}",
        None,
    ),
    (
        "a count that is behind",
        (f"UPDATE models SET last_version = 1 WHERE {IS_ACME}",),
        ("error", "pointer", "acme:m"),
        f"SELECT last_version FROM models WHERE {IS_ACME}",
        3,
    ),
    (
        "a name without versions",
        ("INSERT INTO models (tenant, name, active, last_version, created) VALUES (1, 'none', 1, 0, 0)",),
        ("warning", "pointer", "default:none"),
        "SELECT COUNT(*) FROM models",
        2,
    ),
    (
        "a size that is not the file's",
        (f"UPDATE versions SET bytes = 99 WHERE version = 3 AND {ACME}",),
        ("warning", "size", "acme:m@3"),
        f"SELECT bytes FROM versions WHERE version = 3 AND {ACME}",
        5,
    ),
    (
        "parts of an upload that has ended",
        ("UPDATE uploads SET status = 'cancelled'", "DELETE FROM keys"),
        ("warning", "parts", "upload"),
        "SELECT COUNT(*) FROM upload_parts",
        0,
    ),
]


@pytest.mark.parametrize(
    ("damage", "wanted", "question", "answer"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS]
)
def test_rows_that_point_to_nothing_are_mended(
    clinic: Clinic, damage: tuple[str, ...], wanted: tuple[str, str, str], question: str, answer: Any
) -> None:
    clinic.sql(*damage)
    status, ((severity, check, subject),) = clinic.finds()
    assert (status, (severity, check, subject[: len(wanted[2])])) == (MENDABLE, wanted)
    assert clinic.finds("--repair") == (HEALTHY, [])
    assert clinic.rows(question) == [(answer,)]


def test_what_a_deleted_tenant_left_is_told_and_its_keys_go(clinic: Clinic) -> None:
    clinic.sql(
        GONE,
        f"INSERT INTO shares SELECT id, (SELECT id FROM tenants WHERE name = 'globex') FROM models WHERE {IS_ACME}",
    )
    status, found = clinic.finds()
    assert status == BEYOND_REPAIR
    assert [(check, subject[:8]) for _, check, subject in found] == [
        ("owner", "globex:m"),
        ("owner", "globex/" + clinic.rows("SELECT id FROM keys ORDER BY tenant")[-1][0][:1]),
        ("owner", "acme:m"),
    ]
    assert clinic.finds("--repair") == (BEYOND_REPAIR, [("warning", "owner", "globex:m")]), "weights are not deleted"
    assert len(clinic.rows("SELECT * FROM keys")) == 1 and clinic.rows("SELECT * FROM shares") == []


def test_a_bill_that_cannot_be_and_a_quota_that_is_passed_are_told(clinic: Clinic) -> None:
    clinic.sql(
        DAYS.format(2, -1),
        DAYS.format(77, 1),
        """UPDATE tenants SET limits = '{"max_bytes": 4}' WHERE name = 'acme'""",
    )
    wanted = [("error", "usage", "acme:m"), ("warning", "usage", "acme"), ("note", "quota", "acme")]
    assert clinic.finds() == clinic.finds("--repair") == (BEYOND_REPAIR, wanted)


def test_a_description_that_is_no_json_is_told(clinic: Clinic) -> None:
    clinic.sql(f"UPDATE versions SET summary = '{{' WHERE version = 3 AND {ACME}")
    assert clinic.finds() == (BEYOND_REPAIR, [("error", "summary", "acme:m@3")])


def test_others_on_the_machine_are_kept_out(clinic: Clinic) -> None:
    for mode, severity in ((0o755, "warning"), (0o777, "error"), (0o730, "error")):
        clinic.root.chmod(mode)
        assert clinic.finds() == (MENDABLE, [(severity, "access", str(clinic.root))])
        assert clinic.finds("--repair") == (HEALTHY, [])
        assert clinic.root.stat().st_mode & 0o777 == mode & 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_given_back(clinic: Clinic) -> None:
    os.chown(clinic.object(b"one"), 12345, -1)
    assert clinic.finds() == (MENDABLE, [("error", "access", str(clinic.object(b"one")))])
    assert clinic.finds("--repair") == (HEALTHY, [])


def test_little_room_is_told(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(clinic.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    assert clinic.finds() == (BEYOND_REPAIR, [("error", "room", str(clinic.root))])


def test_a_registry_that_is_damaged_is_told(clinic: Clinic, capsys: pytest.CaptureFixture[str]) -> None:
    clinic.sql("PRAGMA foreign_keys = OFF", "DELETE FROM tenants WHERE name = 'globex'")
    status, found = clinic.finds()
    assert status == BEYOND_REPAIR and ("error", "registry", "registry") in found
    (clinic.root / "registry.sqlite").write_bytes(b"no database" * 1000)
    assert cli.main(["doctor", "--store", str(clinic.root)]) == 1
    assert "registry.sqlite cannot be used: file is not a database" in capsys.readouterr().err


def test_beside_a_server_it_only_looks_and_only_when_asked(clinic: Clinic, capsys: pytest.CaptureFixture[str]) -> None:
    server = SqliteRegistry(clinic.root)
    for flags in ((), ("--repair",)):
        assert cli.main(["doctor", "--store", str(clinic.root), *flags]) == 1
        assert "another server works on this store" in capsys.readouterr().err
    clinic.object(b"one").unlink()
    assert clinic.finds("--online") == (BEYOND_REPAIR, [("error", "object", "acme:m@1")])
    assert cli.main(["doctor", "--store", str(clinic.root), "--online", "--repair"]) == 2
    server.close()


def test_where_there_is_no_store_none_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--store", str(tmp_path / "typo")]) == 1
    assert "there is no store here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_registry_of_an_earlier_version_is_left_as_it_is(clinic: Clinic, capsys: pytest.CaptureFixture[str]) -> None:
    clinic.sql("PRAGMA user_version = 1")
    assert cli.main(["doctor", "--store", str(clinic.root)]) == 1
    assert "the registry has schema 1 of" in capsys.readouterr().err
    assert clinic.rows("PRAGMA user_version") == [(1,)]


def test_people_are_told_whose_model_it_is_and_what_to_do(clinic: Clinic, capsys: pytest.CaptureFixture[str]) -> None:
    clinic.object(b"three").write_bytes(b"thr3e")
    (clinic.root / "incoming" / "tmpx").write_bytes(b"left")
    assert cli.main(["doctor", "--store", str(clinic.root)]) == BEYOND_REPAIR
    text = capsys.readouterr().out
    assert "3 tenants, 2 models, 4 versions; 3 files of 11 B, 1 parts" in text
    assert "error    acme:m@3\n" in text and "warning  " in text
    assert "--repair: set it aside as quarantine/objects-" in text
    assert text.endswith("2 findings; --repair would heal 1 of them\n")
    assert cli.main(["doctor", "--store", str(clinic.root), "--repair"]) == BEYOND_REPAIR
    text = capsys.readouterr().out
    assert "mended   acme:m@3" in text and "upload the same file again" in text


def test_a_database_and_a_bucket_are_examined_as_a_folder_is(
    postgres_url: str, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, files = open_places(s3_url, postgres_url, tmp_path / "cache", 0)
    store, owner = DeltaStore(registry, files, keep_versions=3), Accounts(registry).default
    for data in (b"one", b"two"):
        upload = store.begin_upload(100)
        upload.write(data)
        store.commit(Destination(owner, "m", "test"), upload, upload.finish(None), SUMMARY)
        upload.close()

    def finds(*flags: str) -> tuple[int, list[tuple[str, str]]]:
        status = cli.main(["doctor", "--store", s3_url, "--registry", postgres_url, "--json", *flags])
        told = capsys.readouterr()
        assert told.out, told.err
        return status, [(one["check"], one["subject"]) for one in json.loads(told.out)["findings"]]

    assert finds() == finds("--repair") == (HEALTHY, [])
    with registry.write() as db:
        db.execute("UPDATE models SET active = 9")
    assert finds() == (MENDABLE, [("pointer", "default:m")])
    assert finds("--repair") == (HEALTHY, [])
    files.put(object_key(digest_of(b"two")), write(tmp_path / "damage", b"tw0"))
    assert finds("--quick") == (HEALTHY, [])
    assert finds() == finds("--repair") == (BEYOND_REPAIR, [("object", "default:m@2")])
    files.put(object_key(digest_of(b"two")), write(tmp_path / "two", b"two"))
    assert finds() == (HEALTHY, [])
    files.close()
    registry.close()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
