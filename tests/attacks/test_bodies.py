"""Bodies that are too many, each within its own bound: a tenant fills no memory but its share, and nobody else's."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from types import ModuleType

    import httpx

MEBI = 2**20
PATH = "/v1/completions"
ASKED = {"model": "tiny", "prompt": "x", "max_tokens": 1}
END_S = 60.0


def begin(town: Any, key: str, length: int) -> socket.socket:
    """A request whose body has still to come."""
    where = urlsplit(town.server.url)
    connection = socket.create_connection((where.hostname, where.port), timeout=END_S)
    lines = [f"POST {PATH} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", "Content-Type: application/json"]
    connection.sendall("\r\n".join([*lines, f"Content-Length: {length}"]).encode() + b"\r\n\r\n")
    return connection


def send(http: httpx.Client) -> httpx.Response:
    return http.post(PATH, content=b" " * (16 * MEBI), headers={"Content-Type": "application/json"})


def is_refused(reply: httpx.Response) -> httpx.Response | None:
    assert reply.status_code in (400, 429), reply.text
    return reply if reply.status_code == 429 else None


def test_bodies_of_a_tenant_are_bounded_together(town: Any, process: ModuleType) -> None:
    """Threat: a hundred bodies of 32 MiB at once are 3 GiB."""
    tenant = town.new_tenant()
    key = town.new_key(tenant, "inference")["key"]
    guest, other = town.with_key(key), town.client(town.new_tenant(), "inference")
    with ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(begin(town, key, 32 * MEBI))
            connection.sendall(b" " * (31 * MEBI))
        connection.settimeout(2)

        def refused_now() -> httpx.Response | None:
            with suppress(TimeoutError):
                assert connection.recv(1) == b"", "nothing is said before the body is whole"
            return is_refused(send(guest))

        refused = process.wait_until(refused_now, "the two have arrived", END_S)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded", refused.text
        assert 0 < int(refused.headers["retry-after"]) <= 120
        assert guest.post(PATH, json=ASKED).status_code == 200, "what is small has its place"
        assert send(other).status_code == 400
    process.wait_until(lambda: not is_refused(send(guest)), "they are let go", END_S)


def test_who_has_no_request_left_is_told_before_the_body(town: Any) -> None:
    """Threat: bodies that are parsed only to be refused."""
    key = town.new_key(town.new_tenant(requests_per_minute=1), "inference")["key"]
    assert town.with_key(key).post(PATH, json=ASKED).status_code == 200
    with begin(town, key, 32 * MEBI) as connection:
        said = connection.recv(65536)
    assert said.startswith(b"HTTP/1.1 429") and b"x-ratelimit-remaining-requests: 0" in said.lower(), said
    assert town.with_key(key).get("/v1/models").status_code == 200, "questions are not counted"
