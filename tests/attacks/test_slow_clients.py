"""Clients that take their time: headers and bodies that trickle, or stop. They are let go, and others are served."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY = "slow-admin"
PATIENCE_S = 2
CROWD = 200
END_S = 30.0  # on a busy machine


@pytest.fixture(scope="module")
def hasty(process: Any, tiny_base: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = tmp_path_factory.mktemp("hasty") / "store"
    with process.ServerProcess(tiny_base, store, "--client-timeout-s", str(PATIENCE_S), api_key=KEY) as running:
        yield running.wait_ready()


def connect(server: Any) -> socket.socket:
    where = urlsplit(server.url)
    return socket.create_connection((where.hostname, where.port), timeout=END_S)


def request(path: str, *headers: str, method: str = "POST", key: str = KEY) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def read_to_end(connection: socket.socket) -> bytes:
    """What the server says until it closes the connection. Raises TimeoutError where it does not."""
    said = b""
    while piece := connection.recv(65536):
        said += piece
    return said


def trickle(connection: socket.socket, byte: bytes) -> bytes:
    """A byte every now and then, until the server has had enough; what it says to that."""
    connection.settimeout(0.1)
    deadline, said = time.monotonic() + END_S, b""
    while time.monotonic() < deadline:
        try:
            connection.sendall(byte)
            piece = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return said
        if not piece:
            return said
        said += piece
    raise AssertionError(f"the server still waits after {END_S} s; it said {said!r}")


def test_a_crowd_that_never_ends_its_headers_is_let_go_and_others_are_served(hasty: Any) -> None:
    """Threat: slowloris. Every connection of the server is held by requests that never begin."""
    crowd = [connect(hasty) for _ in range(CROWD)]
    for number, connection in enumerate(crowd):
        if number % 3:  # the others say nothing at all
            connection.sendall(request("/v1/models")[: 20 + number % 40])
    assert hasty.http.get("/v1/models").status_code == 200
    assert all(read_to_end(connection) == b"" for connection in crowd)
    for connection in crowd:
        connection.close()


@pytest.mark.parametrize("before", [b"", request("/health", method="GET")], ids=["first request", "second request"])
def test_headers_that_trickle_come_to_an_end(hasty: Any, before: bytes) -> None:
    with connect(hasty) as connection:
        connection.sendall(before + b"GET /health HTTP/1.1\r\nX-Slow: ")
        said = trickle(connection, b"x")
    assert said.startswith(b"HTTP/1.1 200") if before else said == b""


LARGE = "Content-Length: 100000"
SENDS: dict[str, Callable[[], bytes]] = {
    "chat": lambda: request("/v1/chat/completions", "Content-Type: application/json", LARGE),
    "upload": lambda: request("/v1/deltas/slow", LARGE, method="PUT"),
    "upload in chunks": lambda: request("/v1/deltas/slow", "Transfer-Encoding: chunked", method="PUT"),
}


@pytest.mark.parametrize("name", SENDS)
def test_a_body_that_stops_is_a_408(hasty: Any, name: str) -> None:
    """Threat: requests that hold memory, a file and a quota for as long as their client likes."""
    with connect(hasty) as connection:
        connection.sendall(SENDS[name]() + (b"5\r\nabcde\r\n" if "chunks" in name else b"abcde"))
        said = read_to_end(connection)
    assert said.startswith(b"HTTP/1.1 408") and b"request_timeout" in said, said
    assert list((hasty.store / "incoming").iterdir()) == []


@pytest.mark.parametrize("name", ["chat", "upload"])
def test_a_body_that_trickles_is_a_408(hasty: Any, name: str) -> None:
    """Threat: one byte just before each time is up."""
    with connect(hasty) as connection:
        connection.sendall(SENDS[name]())
        said = trickle(connection, b" ")
    assert said.startswith(b"HTTP/1.1 408"), said


def test_a_body_that_nobody_wants_is_not_waited_for(hasty: Any) -> None:
    """Threat: who has no key holds a connection by the body of a request that was refused."""
    with connect(hasty) as connection:
        connection.sendall(request("/v1/deltas/slow", LARGE, method="PUT", key="none"))
        said = trickle(connection, b" ")
    assert said.startswith(b"HTTP/1.1 401"), said


def test_a_slow_answer_is_none_of_these(hasty: Any, process: Any) -> None:
    """A client that has sent all it had to may wait, and read, for longer."""
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": true, "stream": true}'
    with connect(hasty) as connection:
        kind = "Content-Type: application/json"
        connection.sendall(request("/v1/completions", kind, f"Content-Length: {len(body)}", "Connection: close") + body)
        end = time.monotonic() + 1.5 * PATIENCE_S
        process.wait_until(lambda: time.monotonic() > end, "a body would have been given up")
        said = read_to_end(connection)
    assert said.startswith(b"HTTP/1.1 200") and b"[DONE]" in said
