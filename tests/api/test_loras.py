"""vLLM's and Dynamo's routes for adapters, as their operators call them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import obstore
from obstore.store import S3Store

from deltaserve.deltas.s3 import CLIENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

    ErrorOf = Callable[..., dict[str, Any]]


def load(http: httpx.Client, name: str, path: str, **more: Any) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_artifacts_under_the_import_root_are_loaded_replaced_and_unloaded(
    start_server: Callable[..., Any], tenants: dict[str, Any], tmp_path: Path, error_of: ErrorOf
) -> None:
    root = tmp_path / "imports"
    root.mkdir()
    for name in ("sign", "sparse"):
        (root / f"{name}.safetensors").write_bytes(tenants[name].artifact)
    (root / "broken").write_bytes(tenants["sign"].artifact[:-1])
    (tmp_path / "outside").write_bytes(tenants["sign"].artifact)
    (root / "link").symlink_to(tmp_path / "outside")
    server = start_server("--import-root", str(root), api_key="first-key")
    http = server.http

    def answer(model: str) -> str:
        body = {"model": model, "prompt": "Many", "max_tokens": 8, "temperature": 0}
        return str(http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"])

    def expected(name: str) -> str:
        return str(tenants[name].greedy(tenants[name].encode("Many"), 8)[0])

    reply = load(http, "m", "sign.safetensors")
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'm' added successfully.")
    assert reply.headers["content-type"].startswith("text/plain")
    assert answer("m") == expected("sign")
    reply = load(http, "m", "sparse.safetensors")
    error_of(reply, 409, "name_conflict")
    assert reply.headers["x-should-retry"] == "false"
    assert load(http, "m", f"{root}/sparse.safetensors", load_inplace=True).status_code == 200
    assert answer("m") == expected("sparse") and answer("m@1") == expected("sign")

    for path in ("absent", "link", "../outside", str(tmp_path / "outside"), "https://example.com/x", "/etc/passwd"):
        told = error_of(load(http, "n", path), 404, "not_found")["message"]
        assert told == f"there is no file {path!r} under the import root"
    assert load(http, "n", "broken").status_code == 422
    error_of(load(http, "tiny", "sign.safetensors"), 409, "name_conflict")
    error_of(load(http, "../n", "sign.safetensors"), 400, "invalid_name")

    http.post("/v1/admin/tenants", json={"name": "acme", "limits": {"max_bytes": 10}})
    error_of(load(http, "acme:m", "sign.safetensors"), 413, "artifact_too_large")
    http.patch("/v1/admin/tenants/acme", json={"limits": {"max_bytes": None}})
    assert load(http, "acme:m", "sign.safetensors").status_code == 200
    key = http.post("/v1/admin/keys", json={"tenant": "acme", "scopes": ["inference", "manage"]}).json()["key"]
    own = {"Authorization": f"Bearer {key}"}
    assert [card["id"] for card in http.get("/v1/deltas", headers=own).json()["data"]] == ["m"]
    for path in ("load_lora_adapter", "unload_lora_adapter"):
        body = {"lora_name": "m", "lora_path": "sign.safetensors"}
        error_of(http.post(f"/v1/{path}", json=body, headers=own), 403, "insufficient_permissions")

    def add(name: str, uri: str) -> httpx.Response:
        return http.post("/v1/loras", json={"lora_name": name, "source": {"uri": uri}})

    added = add("d", f"file://{root}/sign.safetensors").raise_for_status().json()
    assert added["message"] == "LoRA adapter 'd' loaded successfully" and answer("d") == expected("sign")
    assert add("d", f"file://{root}/sign.safetensors").json() == added and answer("d@1") == expected("sign")
    error_of(http.get("/v1/models/d@2"), 404, "model_not_found")
    assert http.get("/v1/loras").json()["loras"]["d"] == added["lora_id"]
    for uri in ("s3://bucket/x", "hf://x/y", "https://example.com/x", "/etc/passwd", "file://elsewhere/x", "file:"):
        assert add("e", uri).status_code in (400, 404), uri
    for path in ("/../outside", "/%2e%2e/outside", f"{tmp_path}/outside", "/etc/passwd", "/link"):
        error_of(add("e", f"file://{path}"), 404, "not_found")
    assert http.request("DELETE", "/v1/loras/d").json()["lora_id"] == added["lora_id"]
    error_of(http.request("DELETE", "/v1/loras/d"), 404, "model_not_found")

    assert unload(http, "m").text == "Success: LoRA adapter 'm' removed successfully."
    error_of(unload(http, "m"), 404, "model_not_found")
    assert (root / "sign.safetensors").read_bytes() == tenants["sign"].artifact
    assert [card["id"] for card in http.get("/v1/deltas").json()["data"]] == ["acme:m"]
    server.stop()


def test_artifacts_in_a_bucket_are_loaded(
    start_server: Callable[..., Any], tenants: dict[str, Any], s3_url: str, error_of: ErrorOf
) -> None:
    bucket = S3Store.from_url(s3_url, client_options=CLIENT)
    for name in ("sign", "sparse"):
        obstore.put(bucket, f"{name}.safetensors", tenants[name].artifact)
    obstore.put(bucket, "broken", tenants["sign"].artifact[:-1])
    server = start_server("--import-root", s3_url, api_key="first-key")
    http = server.http
    assert load(http, "m", "sign.safetensors").status_code == 200
    assert load(http, "m", f"{s3_url}/sparse.safetensors", load_inplace=True).status_code == 200
    digests = [card["sha256"] for card in http.get("/v1/deltas/m/versions").json()["data"]]
    assert digests == [hashlib.sha256(tenants[name].artifact).hexdigest() for name in ("sparse", "sign")]
    body = {"lora_name": "d", "source": {"uri": f"{s3_url}/sign.safetensors"}}
    assert http.post("/v1/loras", json=body).status_code == 200
    for uri, status in (("s3://other/sign.safetensors", 404), ("file:///etc/passwd", 404), ("gs://x/y", 400)):
        assert http.post("/v1/loras", json={**body, "source": {"uri": uri}}).status_code == status
    assert load(http, "n", "broken").status_code == 422
    error_of(load(http, "n", "../sign.safetensors"), 404, "not_found")
    server.stop()


def test_a_server_without_an_import_root_reads_no_file(town: Any, error_of: ErrorOf) -> None:
    error = error_of(load(town["admin"], "m", "/etc/passwd"), 403, "insufficient_permissions")
    assert "--import-root" in error["message"]
