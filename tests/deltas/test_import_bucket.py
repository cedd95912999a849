"""A bucket as the import root: what lies under its prefix is read, whatever leads elsewhere is no file."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import obstore
import pytest
from obstore.store import S3Store

from deltaserve.deltas.import_bucket import open_imports
from deltaserve.deltas.imports import ImportRoot
from deltaserve.deltas.s3 import CLIENT
from deltaserve.errors import BadRequest, NotFound, StoreUnavailable

from ..support.imports import read

if TYPE_CHECKING:
    from pathlib import Path

    from obstore.store import RetryConfig


def put(url: str, key: str, data: bytes) -> None:
    obstore.put(S3Store.from_url(url, client_options=CLIENT), key, data)


def test_what_lies_under_the_prefix_is_read_by_its_key_or_its_url(s3_url: str) -> None:
    large = bytes(range(256)) * 2**16  # over one piece
    put(s3_url, "acme.safetensors", b"one")
    put(s3_url, "folder/large file", large)
    for root in (s3_url, f"{s3_url}/"):
        imports = open_imports(root)
        assert read(imports, "acme.safetensors") == read(imports, f"{s3_url}/acme.safetensors") == b"one"
        assert read(imports, "folder/large file") == large


def test_whatever_leads_out_is_no_file(s3: Any, s3_url: str) -> None:
    put(f"{s3_url}-secret", "file", b"secret")
    put(s3_url, "file", b"mine")
    secret = s3_url.rpartition("/")[2] + "-secret"
    attacks = [
        f"../{secret}/file", f"{s3_url}-secret/file", f"{s3_url}/../{secret}/file", f"/{secret}/file",
        f"{s3_url}%2f..%2f{secret}/file", f"..%2f{secret}%2ffile", f"%2e%2e/{secret}/file", "./file", "file/", "//file",
        "s3://other/file", "", ".", s3_url, f"{s3_url}/", "absent", "https://example.com/file", "file:///etc/passwd",
        "/etc/passwd", "a\0b", "\ud800", "a" * 5000, s3.url(""),
    ]  # fmt: skip
    for asked in attacks:
        with pytest.raises(NotFound) as caught:
            read(open_imports(s3_url), asked)
        assert caught.value.message == f"there is no file {asked[:200]!r} under the import root"


def test_a_bucket_that_cannot_be_read_is_told_at_the_start(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreUnavailable, match="--import-root s3://nowhere"):
        open_imports("s3://nowhere/prefix")
    assert isinstance(open_imports(str(tmp_path)), ImportRoot)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(BadRequest, match=r"deltaserve\[s3\]"):
        open_imports(s3_url)


def test_a_bucket_that_goes_away_is_no_answer_about_its_files(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(s3_url, "file", b"mine")
    imports = open_imports(s3_url)
    once: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=5)}
    nobody = S3Store.from_url(s3_url, endpoint="http://127.0.0.1:1", client_options=CLIENT, retry_config=once)
    monkeypatch.setattr(imports, "_store", nobody)
    with pytest.raises(StoreUnavailable, match="try again"), imports.open("file"):
        pass
