"""Two servers, one PostgreSQL and one S3: what one accepts the other serves, and goes on when it is killed."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

KEY = "first-key"


class Pair:
    """Servers `a` and `b`, and clients of the tenant acme at each."""

    def __init__(self, start: Callable[[str], Any], make_town: Callable[[Any], Any]) -> None:
        self._start = start
        self._clients = ExitStack()
        self.a, self.b = start("a"), start("b")
        self.town = make_town(self.a.wait_ready())
        self.b.wait_ready()
        self.key = self.town.new_key("acme", "inference", "manage")["key"]
        self.at_a, self.at_b = self.client(self.a), self.client(self.b)

    def client(self, server: Any, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return self._clients.enter_context(httpx.Client(base_url=server.url, headers=headers, timeout=120))

    def start_a_again(self) -> None:
        self.a = self._start("a").wait_ready()
        self.at_a = self.client(self.a)

    def close(self) -> None:
        self._clients.close()
        self.town.close()
        for server in (self.a, self.b):
            assert server.stop() == 0, server.printed
            assert "Traceback" not in server.printed, server.printed
            assert not any(secret in server.printed for secret in (KEY, "test-secret", "sec%40ret", self.key))


@pytest.fixture(scope="module")
def pair(
    process: ModuleType, support: Callable[[str], ModuleType], tiny_base: Path, postgres: Any, s3: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:  # fmt: skip
    folder = tmp_path_factory.mktemp("pair")
    registry = postgres.url(f"pair_{os.urandom(4).hex()}").replace("deltaserve@", "deltaserve:sec%40ret@")
    store = s3.url(folder.name)
    started = []

    def start(name: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DELTASERVE_REGISTRY", registry)  # not on the command line, which others can read
            patch.setenv("DELTASERVE_STORE_CACHE", str(folder / name))
            started.append(process.ServerProcess(tiny_base, store, api_key=KEY))
        return started[-1]

    made = Pair(start, support("town").Town)
    try:
        yield made
        made.close()
    finally:
        for server in started:
            server.close()


def says(client: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": "Many fine-tunes", "max_tokens": 12, "temperature": 0}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def put(client: httpx.Client, name: str, data: bytes, **headers: str) -> httpx.Response:
    return client.put(f"/v1/deltas/{name}", content=data, headers=headers)


def begin(client: httpx.Client, name: str, num_bytes: int) -> str:
    kind = {"mime_type": "application/octet-stream", "purpose": "fine-tune"}
    reply = client.post("/v1/uploads", json={"filename": f"{name}.safetensors", "bytes": num_bytes, **kind})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def send(client: httpx.Client, upload: str, data: bytes) -> str:
    reply = client.post(f"/v1/uploads/{upload}/parts", files={"data": data})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def test_a_version_from_one_is_served_by_the_other_and_names_move_for_both_at_once(
    pair: Pair, tenants: dict[str, Any]
) -> None:
    first, second = tenants["sign"].artifact, tenants["sparse"].artifact
    assert put(pair.at_a, "m", first).status_code == 201
    one = says(pair.at_b, "m")
    assert one == says(pair.at_a, "m") != says(pair.at_b, "tiny")
    assert put(pair.at_b, "m", second).json()["version"] == 2
    two = says(pair.at_a, "m")
    assert two == says(pair.at_b, "m@2") != one
    seen = pair.at_b.get("/v1/deltas/m").headers["etag"]
    assert pair.at_a.patch("/v1/deltas/m", json={"version": 1}, headers={"If-Match": seen}).status_code == 200
    late = pair.at_b.patch("/v1/deltas/m", json={"version": 2}, headers={"If-Match": seen})
    assert (late.status_code, late.json()["error"]["code"]) == (412, "precondition_failed")
    assert says(pair.at_b, "m") == says(pair.at_a, "m") == one
    assert put(pair.at_b, "m", second, **{"If-None-Match": "*"}).status_code == 412
    assert pair.at_b.delete("/v1/deltas/m").status_code == 200
    body = {"model": "m", "prompt": "Many"}
    assert pair.at_a.post("/v1/completions", json=body).status_code == 404


def test_keys_limits_and_tenants_change_for_both_with_the_next_request(pair: Pair, tenants: dict[str, Any]) -> None:
    tenant = pair.town.new_tenant(max_models=1)
    made = pair.town.new_key(tenant, "inference", "manage")
    here, there = pair.client(pair.a, made["key"]), pair.client(pair.b, made["key"])
    assert put(there, "one", tenants["lowrank"].artifact).status_code == 201
    full = put(here, "two", tenants["sign"].artifact)
    assert (full.status_code, full.json()["error"]["code"]) == (403, "quota_exceeded")
    admin = pair.client(pair.b, KEY)
    assert admin.patch(f"/v1/admin/tenants/{tenant}", json={"limits": {"max_models": 2}}).status_code == 200
    assert put(here, "two", tenants["sign"].artifact).status_code == 201
    says(here, "one")
    says(there, "one")
    pair.town.admin("DELETE", f"keys/{made['id']}")
    assert there.get("/v1/models").status_code == 401
    other = admin.post("/v1/admin/keys", json={"tenant": tenant, "scopes": ["inference"]}).json()["key"]
    assert pair.client(pair.a, other).get("/v1/models").status_code == 200
    assert admin.delete(f"/v1/admin/tenants/{tenant}").status_code == 200
    assert pair.client(pair.a, other).get("/v1/models").status_code == 401

    def used() -> int:
        rows = admin.get("/v1/admin/usage").json()["data"]
        return sum(int(row["requests"]) for row in rows if row["tenant"] == tenant)

    pair.town.server.http.get("/v1/admin/usage")  # what A has counted is written
    assert used() == 2


def test_parts_sent_to_either_are_joined_by_either(pair: Pair, tenants: dict[str, Any]) -> None:
    data = tenants["chatty"].artifact
    upload = begin(pair.at_a, "parted", len(data))
    third = len(data) // 3
    parts = [
        send(pair.at_a, upload, data[:third]),
        send(pair.at_b, upload, data[third : 2 * third]),
        send(pair.at_a, upload, data[2 * third :]),
    ]
    listed = pair.at_b.get(f"/v1/uploads/{upload}").json()["parts"]
    assert [part["id"] for part in listed] == parts
    done = pair.at_b.post(f"/v1/uploads/{upload}/complete", json={"part_ids": parts})
    assert done.status_code == 200, done.text
    again = pair.at_a.post(f"/v1/uploads/{upload}/complete", json={"part_ids": parts})
    assert again.json() == done.json(), "a repeated request may reach the other server"
    assert says(pair.at_a, "parted") == says(pair.at_b, "parted@1")
    dropped = begin(pair.at_b, "dropped", 10)
    send(pair.at_a, dropped, b"12345")
    assert pair.at_a.post(f"/v1/uploads/{dropped}/cancel").json()["status"] == "cancelled"
    assert pair.at_b.post(f"/v1/uploads/{dropped}/parts", files={"data": b"67890"}).status_code == 400


def test_one_is_killed_in_the_middle_of_everything_and_the_other_goes_on(pair: Pair, tenants: dict[str, Any]) -> None:
    data = tenants["sparse"].artifact
    assert put(pair.at_a, "stays", tenants["sign"].artifact).status_code == 201
    upload = begin(pair.at_a, "halved", len(data))
    first = send(pair.at_a, upload, data[: len(data) // 2])
    with socket.create_connection((httpx.URL(pair.a.url).host, httpx.URL(pair.a.url).port)) as line:
        head = f"PUT /v1/deltas/half HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {pair.key}\r\n"
        line.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: len(data) // 2])
        pair.a.kill()
    assert says(pair.at_b, "stays")
    assert pair.at_b.get("/v1/deltas/half").status_code == 404
    rest = send(pair.at_b, upload, data[len(data) // 2 :])
    done = pair.at_b.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [first, rest]})
    assert done.json()["file"]["id"] == "halved@1", done.text
    pair.start_a_again()
    assert says(pair.at_a, "halved") == says(pair.at_b, "halved")
    assert put(pair.at_a, "half", data).status_code == 201
    assert says(pair.at_b, "half") == says(pair.at_a, "halved")


def test_a_database_that_is_away_is_503_with_retry_after_and_its_return_needs_nobody(pair: Pair, postgres: Any) -> None:
    asked = pair.at_b.get("/v1/models").json()
    postgres.stop()
    try:
        for client, call in (
            (pair.at_a, "/v1/models"),
            (pair.at_b, "/v1/deltas"),
            (pair.client(pair.b, KEY), "/version"),
        ):
            reply = client.get(call)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "registry_unavailable"), reply.text
            assert reply.headers["retry-after"] == "2"
        assert pair.at_b.get("/health").status_code == 200
    finally:
        postgres.start()
    assert pair.at_b.get("/v1/models").json() == asked
    assert pair.at_a.get("/v1/models").status_code == 200
