"""Plain HTTP to the shared server, and one server with a key and hardly any room."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    import httpx

KEY = "secret-key-1"
MAX_UPLOAD_BYTES = 100_000


@pytest.fixture(scope="session")
def http(server: Any) -> httpx.Client:
    client: httpx.Client = server.http
    return client


@pytest.fixture(scope="session")
def guarded(process: ModuleType, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with a key, one seat, a queue of one, and a bound on uploads."""
    store = tmp_path_factory.mktemp("guarded") / "store"
    flags = ["--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--max-upload-bytes", str(MAX_UPLOAD_BYTES)]
    with process.ServerProcess(tiny_base, store, *flags, api_key=KEY) as running:
        yield running.wait_ready()
    assert KEY not in running.printed


@pytest.fixture(scope="session")
def error_of() -> Callable[..., dict[str, Any]]:
    """error_of(reply, status, code): the reply's error, after a check of all that every error has."""

    def check(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
        assert reply.status_code == status, reply.text
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"]
        (error,) = reply.json().values()
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == code, error
        assert error["message"] and " at 0x" not in error["message"]
        return dict(error)

    return check


@pytest.fixture(scope="session")
def split() -> Callable[[bytes], tuple[dict[str, Any], bytes]]:
    """Header and data of a safetensors file."""

    def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
        (length,) = struct.unpack("<Q", raw[:8])
        return json.loads(raw[8 : 8 + length]), raw[8 + length :]

    return split


@pytest.fixture(scope="session")
def join() -> Callable[[dict[str, Any], bytes], bytes]:
    def join(header: dict[str, Any], data: bytes) -> bytes:
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data

    return join
