"""Files in a bucket: what is cached, what is checked, and what happens when the bucket is wrong or away."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.deltas.places import open_places
from deltaserve.deltas.s3 import S3Files
from deltaserve.errors import BadRequest, DeltaLoadFailed, IncompatibleStore, StoreInUse, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 1000


@pytest.fixture
def server(s3_url: str, tmp_path: Path) -> Iterator[Callable[[str], S3Files]]:
    """server(name): that server's files."""
    opened: list[S3Files] = []

    def open_one(name: str) -> S3Files:
        opened.append(S3Files(s3_url, tmp_path / name, LIMIT, "mine"))
        return opened[-1]

    yield open_one
    for files in opened:
        files.close()


def put(files: S3Files, data: bytes) -> str:
    source = files.incoming / "upload"
    source.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    key = f"objects/{digest[:2]}/{digest}.safetensors"
    files.put(key, source)
    return key


def read(files: S3Files, key: str) -> bytes:
    with files.reading(key) as path:
        return path.read_bytes()


def cached(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in (root / "objects").glob("*/*")}


def test_what_one_puts_the_other_reads_and_keeps_as_far_as_there_is_room(
    server: Callable[[str], S3Files], tmp_path: Path
) -> None:
    a, b = server("a"), server("b")
    small, other, large = put(a, b"s" * 400), put(a, b"o" * 500), put(a, b"l" * 5000)
    assert set(b.keys("objects")) == {small, other, large} and list(b.keys("parts")) == []
    assert read(b, small) == b"s" * 400 and read(b, other) == b"o" * 500
    assert cached(tmp_path / "b") == {small, other} and b.cached_bytes == 900
    read(b, small)
    with b.reading(large) as path:
        assert path.stat().st_size == 5000, "what is read is there, however large"
        assert cached(tmp_path / "b") == {large}
    assert cached(tmp_path / "b") == set() and b.cached_bytes == 0
    for key in (other, small):
        read(b, key)
    third = put(b, b"t" * 300)
    assert cached(tmp_path / "b") == {small, third}, "what was used last stays"
    b.close()
    again = server("b")
    assert again.cached_bytes == 700 and list(again.incoming.iterdir()) == []


def test_what_is_removed_is_gone_for_all_but_who_reads_it(server: Callable[[str], S3Files]) -> None:
    a, b = server("a"), server("b")
    key = put(a, b"one")
    with b.reading(key) as path:
        a.remove(key)
        a.remove(key)
        assert path.read_bytes() == b"one"
    b.remove(key)
    for files in (a, b):
        with pytest.raises(FileNotFoundError), files.reading(key):
            pass


def test_a_damaged_copy_is_fetched_again_and_a_damaged_object_is_never_read(
    server: Callable[[str], S3Files], tmp_path: Path
) -> None:
    a, b = server("a"), server("b")
    key = put(a, b"one")
    read(b, key)
    (tmp_path / "b" / key).write_bytes(b"0ne")
    with pytest.raises(DeltaLoadFailed), b.reading(key):  # as `read_delta` does, of bytes with another digest
        raise DeltaLoadFailed("damaged")
    assert read(b, key) == b"one"
    a._obstore.put(a._store, key, b"0ne")
    b._forget(key)
    for _ in range(2):
        with pytest.raises(DeltaLoadFailed, match="damaged"), b.reading(key):
            pass
    assert cached(tmp_path / "b") == set() and list(b.incoming.iterdir()) == []


def test_a_bucket_of_another_registry_a_cache_of_another_server_and_no_bucket_are_refused(
    server: Callable[[str], S3Files], s3_url: str, tmp_path: Path
) -> None:
    server("a")
    with pytest.raises(StoreInUse):
        S3Files(s3_url, tmp_path / "a", LIMIT, "mine")
    with pytest.raises(IncompatibleStore):
        S3Files(s3_url, tmp_path / "b", LIMIT, "yours")
    for url in ("s3://there-is-no-such-bucket/x", "s3://"):
        with pytest.raises(StoreUnavailable, match="--store"):
            S3Files(url, tmp_path / "b", LIMIT, "mine")
    server("b")


def test_a_bucket_that_is_away_is_an_answer_and_what_is_cached_is_read(
    tmp_path: Path, support: Callable[[str], Any], s3: Any
) -> None:
    own = support("s3").S3()
    files = S3Files(own.url("x"), tmp_path, LIMIT, "mine")
    here, there = put(files, b"here"), put(files, b"there")
    files._forget(there)
    own.stop()
    s3.lead_here()
    assert read(files, here) == b"here"
    for call in (lambda: read(files, there), lambda: put(files, b"new"), lambda: list(files.keys("objects"))):
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert caught.value.retry_after_s and "127.0.0.1" not in caught.value.message
    with pytest.raises(StoreUnavailable):
        files.remove(here)
    assert read(files, here) == b"here"
    files.close()


@pytest.mark.parametrize(
    ("store", "registry", "said"),
    [
        ("s3://bucket/x", None, "go together"),
        ("folder", "postgresql://x@y/z", "go together"),
        ("s3://bucket/x", "mysql://x@y/z", "postgresql://"),
    ],
)
def test_half_of_a_shared_pair_is_refused(store: str, registry: str | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=said):
        open_places(store, registry, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_an_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(BadRequest, match=r"pip install 'deltaserve\[postgres\]'"):
        open_places("s3://x/y", "postgresql://x@y/z", tmp_path, 1)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(BadRequest, match=r"pip install 'deltaserve\[s3\]'"):
        S3Files("s3://x/y", tmp_path, 1, "mine")
