"""Uploads in parts over plain HTTP: going on after an interruption or a kill, and forms that are none."""

from __future__ import annotations

import hashlib
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

    ErrorOf = Callable[..., dict[str, Any]]


def create(http: httpx.Client, num_bytes: int, name: str = "m", **more: Any) -> str:
    body = {"bytes": num_bytes, "filename": f"{name}.safetensors", "mime_type": "", "purpose": "fine-tune", **more}
    reply = http.post("/v1/uploads", json=body)
    assert reply.status_code == 200, reply.text
    upload: str = reply.json()["id"]
    return upload


def send(http: httpx.Client, upload: str, data: bytes) -> str:
    reply = http.post(f"/v1/uploads/{upload}/parts", files={"data": data})
    assert reply.status_code == 200, reply.text
    part: str = reply.json()["id"]
    assert part == f"part_{hashlib.sha256(data).hexdigest()}"
    return part


def complete(http: httpx.Client, upload: str, *parts: str, **more: str) -> httpx.Response:
    return http.post(f"/v1/uploads/{upload}/complete", json={"part_ids": parts, **more})


def files(store: Path) -> list[str]:
    return sorted(path.name for top in ("parts", "incoming") for path in (store / top).rglob("*") if path.is_file())


def test_an_upload_goes_on_after_a_kill(
    start_server: Callable[..., Any], tenants: dict[str, Any], tmp_path: Path
) -> None:
    artifact, store = tenants["sign"].artifact, tmp_path / "store"
    half = len(artifact) // 2
    pieces = [artifact[:half], artifact[half:]]
    server = start_server("--upload-expires-s", "4000")
    upload = create(server.http, len(artifact))
    card = server.http.get(f"/v1/uploads/{upload}").json()
    assert card["expires_at"] == card["created_at"] + 4000
    send(server.http, upload, pieces[0])
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as unfinished:
        head = f"POST /v1/uploads/{upload}/parts HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n"
        unfinished.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
        unfinished.sendall(b'Content-Disposition: form-data; name="data"; filename="f"\r\n\r\n' + b"x" * 5000)
        server.kill()

    server = start_server()
    card = server.http.get(f"/v1/uploads/{upload}").json()
    digest = hashlib.sha256(pieces[0]).hexdigest()
    assert (card["status"], [part["sha256"] for part in card["parts"]]) == ("pending", [digest])
    assert [part["bytes"] for part in card["parts"]] == [half] and files(store) == [digest]
    parts = [card["parts"][0]["id"], send(server.http, upload, pieces[1])]
    whole = hashlib.sha256(artifact).hexdigest()
    done = complete(server.http, upload, *parts, sha256=whole).json()
    assert (done["status"], done["file"]["id"], done["file"]["sha256"]) == ("completed", "m@1", whole)
    server.kill()

    server = start_server()
    assert complete(server.http, upload, *parts).json() == done
    assert server.http.get(f"/v1/uploads/{upload}").json() == {**done, "parts": []}
    assert files(store) == []
    body = {"model": "m", "prompt": "Many", "max_tokens": 4, "temperature": 0}
    expected = tenants["sign"].greedy(tenants["sign"].encode("Many"), 4)[0]
    assert server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
    server.stop()


def test_a_form_of_anything_but_the_one_field_is_refused(town: Any, error_of: ErrorOf) -> None:
    http, b = town["acme"], b"--b\r\n"
    upload = create(http, 10)
    field = b'Content-Disposition: form-data; name="data"\r\n\r\n'
    hostile = {
        "empty": b"",
        "no form": b"x" * 100,
        "cut in its header": b + field[:20],
        "cut in its data": b + field + b"x",
        "another field": b + field.replace(b"data", b"date") + b"x\r\n--b--\r\n",
        "no name": b + b"Content-Type: text/plain\r\n\r\nx\r\n--b--\r\n",
        "two fields": b + field + b"x\r\n" + b + field + b"y\r\n--b--\r\n",
        "no field": b"--b--\r\n",
        "an empty field": b + field + b"\r\n--b--\r\n",
        "an endless header": b + b"X: " + b"y" * 100_000 + b"\r\n\r\nx\r\n--b--\r\n",
        "many headers": b + b"X: y\r\n" * 1000 + field + b"x\r\n--b--\r\n",
    }
    path = f"/v1/uploads/{upload}/parts"
    for what, body in hostile.items():
        reply = http.post(path, content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert error_of(reply, 400, "invalid_request")["param"] == "data", what
    for kind in ("application/json", "multipart/form-data", f"multipart/form-data; boundary={'b' * 5000}", ""):
        reply = http.post(path, content=b + field + b"x\r\n--b--\r\n", headers={"Content-Type": kind})
        error_of(reply, 400, "invalid_request")
    assert http.get(f"/v1/uploads/{upload}").json()["parts"] == []
    send(http, upload, b"\r\n--b\r\n\r\n")
    http.post(f"/v1/uploads/{upload}/cancel")
    assert files(town.server.store) == []


def test_bounds_of_bytes(town: Any, error_of: ErrorOf) -> None:
    guest = town.new_tenant(max_bytes=100)
    http = town.client(guest, "manage")
    body = {"bytes": 101, "filename": "m.safetensors", "mime_type": "", "purpose": "fine-tune"}
    error_of(http.post("/v1/uploads", json=body), 413, "artifact_too_large")
    error_of(town["acme"].post("/v1/uploads", json={**body, "bytes": 2**60}), 413, "artifact_too_large")
    upload = create(http, 60)
    error_of(http.post(f"/v1/uploads/{upload}/parts", files={"data": b"x" * 61}), 413, "artifact_too_large")
    send(http, upload, b"x" * 10)
    error_of(http.post(f"/v1/uploads/{upload}/parts", files={"data": b"y" * 51}), 400, "invalid_request")
    assert error_of(http.post("/v1/uploads", json={**body, "bytes": 41}), 429, "rate_limit_exceeded")
    error_of(http.put("/v1/deltas/m", content=b"z" * 41), 429, "rate_limit_exceeded")
    http.post(f"/v1/uploads/{upload}/cancel")
    error_of(http.put("/v1/deltas/m", content=b"z" * 41), 422, "artifact_corrupt")
    town.admin("DELETE", f"tenants/{guest}")


def test_a_part_over_64_mib_is_refused_and_the_server_grows_by_little(town: Any, error_of: ErrorOf) -> None:
    def resident() -> int:
        with open(f"/proc/{town.server.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    http, most = town["acme"], 64 * 2**20
    upload = create(http, 2 * most)
    before = resident()
    reply = http.post(f"/v1/uploads/{upload}/parts", files={"data": bytes(most + 1)})
    error_of(reply, 413, "artifact_too_large")
    send(http, upload, bytes(most))
    assert resident() - before < most // 4
    http.post(f"/v1/uploads/{upload}/cancel")


def test_other_paths_keep_their_bound(town: Any) -> None:
    for method, path in (("POST", "/v1/uploads"), ("POST", "/v1/uploads/x/complete"), ("PUT", "/v1/nothing")):
        reply = town["acme"].request(method, path, content=b" " * (33 * 2**20))
        assert reply.status_code in (400, 404), reply.text


@pytest.mark.parametrize("who", ["acme", "admin"])
def test_an_admin_uploads_for_a_tenant_and_others_cannot(
    town: Any, tenants: dict[str, Any], error_of: ErrorOf, who: str
) -> None:
    artifact, http = tenants["sparse"].artifact, town[who]
    if who == "acme":
        body = {"bytes": 1, "filename": "globex:new.safetensors", "mime_type": "", "purpose": "fine-tune"}
        told = error_of(http.post("/v1/uploads", json=body), 404, "model_not_found")["message"]
        absent = error_of(
            http.post("/v1/uploads", json={**body, "filename": "nobody:new.safetensors"}), 404, "model_not_found"
        )["message"]
        assert told.replace("globex", "nobody") == absent
    else:
        upload = create(http, len(artifact), "acme:given", activate=False)
        done = complete(http, upload, send(http, upload, artifact)).json()
        assert done["file"]["id"] == "acme:given@1"
        assert town["acme"].get("/v1/deltas/given").json()["version"] == 1
        town["acme"].delete("/v1/deltas/given")
