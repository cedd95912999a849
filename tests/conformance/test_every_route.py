"""Every route of the OpenAPI document, by curl, by our client and by the official one, sync and async. What is not
asked fails a test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.api.openapi import REPLIES

from .callers import ASK, KIND, by_async_openai, by_curl, by_openai, by_ours

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[..., Any]


FREE = ("loras", "detail")  # objects whose names are data


def check_shape(reply: Any, example: Any, where: str) -> None:
    """The names and types of a reply are those of its example in the OpenAPI document."""
    if reply is None or example is None:
        return
    number = isinstance(reply, int | float) and isinstance(example, int | float)
    assert number or type(reply) is type(example), (where, reply, example)
    if isinstance(reply, dict) and where not in FREE:
        assert reply.keys() == example.keys(), where
        for name, value in reply.items():
            check_shape(value, example[name], name)
    elif isinstance(reply, list) and example:
        for value in reply:
            check_shape(value, example[0], where)


CLIENTS = {"curl": by_curl, "ours": by_ours, "openai": by_openai, "async-openai": by_async_openai}


@pytest.mark.parametrize("kind", CLIENTS)
def test_every_route_answers(
    kind: str,
    site: Any,
    routes: set[tuple[str, str]],
    tenants: dict[str, Any],
    tiny_base: Path,
    imports: Path,
    tmp_path: Path,
) -> None:
    send = CLIENTS[kind](site.url, tmp_path)
    seen: set[tuple[str, str]] = set()

    def call(method: str, route: str, *args: Any, query: str = "", **more: Any) -> Any:
        """`route` as the document has it, with its values after the names: /v1/models/{model=x}."""
        seen.add((method, re.sub(r"=[^}]*", "", route)))
        reply = send(method, re.sub(r"\{\w+=([^}]*)\}", r"\1", route) + query, *args, **more)
        if route != "/health":
            check_shape(reply, REPLIES[f"{method} {re.sub(r'=[^}]*', '', route)}"], route)
        return reply

    tenant, sign, other = f"by-{kind}", tenants["sign"].artifact, tenants["lowrank"].artifact
    assert call("GET", "/health") == "" and call("GET", "/version")["version"]
    assert "vllm:num_requests_running" in call("GET", "/metrics")
    assert call("POST", "/v1/admin/tenants", {"name": tenant})["id"] == tenant
    assert tenant in [one["id"] for one in call("GET", "/v1/admin/tenants")["data"]]
    assert call("GET", f"/v1/admin/tenants/{{name={tenant}}}")["models"] == 0
    limited = call("PATCH", f"/v1/admin/tenants/{{name={tenant}}}", {"limits": {"max_models": 9}})
    assert limited["limits"]["max_models"] == 9
    key = call("POST", "/v1/admin/keys", {"tenant": tenant})
    assert [one["id"] for one in call("GET", "/v1/admin/keys", query=f"?tenant={tenant}")["data"]] == [key["id"]]
    new = call("POST", f"/v1/admin/keys/{{key_id={key['id']}}}/rotate", {})
    assert call("DELETE", f"/v1/admin/keys/{{key_id={new['id']}}}")["revoked"]
    name = f"{tenant}:m"
    assert [call("PUT", f"/v1/deltas/{{name={name}}}", raw=raw)["version"] for raw in (sign, other)] == [1, 2]
    assert call("GET", f"/v1/deltas/{{name={name}}}")["version"] == 2
    assert call("PATCH", f"/v1/deltas/{{name={name}}}", {"version": 1})["active"] == 1
    assert name in [one["id"] for one in call("GET", "/v1/deltas")["data"]]
    assert len(call("GET", f"/v1/deltas/{{name={name}}}/versions")["data"]) == 2
    assert call("POST", f"/v1/deltas/{{name={name}}}/prewarm")["id"] == name
    assert call("POST", "/v1/completions", {**ASK, "model": name})["usage"]["completion_tokens"] == 1
    chat = {"model": f"{name}@2", "messages": [{"role": "user", "content": "Many"}], "max_tokens": 1}
    assert call("POST", "/v1/chat/completions", chat)["object"] == "chat.completion"
    assert name in [one["id"] for one in call("GET", "/v1/models")["data"]]
    assert call("GET", f"/v1/models/{{model={name}}}")["owned_by"] == tenant
    begun = {"bytes": len(sign), "filename": f"{tenant}:u.safetensors", **KIND}
    one, two = (call("POST", "/v1/uploads", begun)["id"] for _ in range(2))
    part = call("POST", f"/v1/uploads/{{upload_id={one}}}/parts", part=sign)["id"]
    assert call("GET", f"/v1/uploads/{{upload_id={one}}}")["parts"][0]["id"] == part
    done = call("POST", f"/v1/uploads/{{upload_id={one}}}/complete", {"part_ids": [part]})
    assert done["file"]["id"] == f"{tenant}:u@1"
    assert call("POST", f"/v1/uploads/{{upload_id={two}}}/cancel")["status"] == "cancelled"
    config, weights = ((tiny_base / file).read_bytes() for file in ("config.json", "model.safetensors"))
    spare, file = (call("POST", "/v1/files", part=config)["id"] for _ in range(2))
    assert call("DELETE", f"/v1/files/{{file_id={spare}}}")["deleted"]
    assert call("GET", f"/v1/files/{{file_id={file}}}")["filename"] == "config.json"
    begun = {"bytes": len(weights), "filename": "model.safetensors", **KIND, "purpose": "user_data"}
    upload = send("POST", "/v1/uploads", begun)["id"]
    part = send("POST", f"/v1/uploads/{upload}/parts", part=weights)["id"]
    sent = [send("POST", f"/v1/uploads/{upload}/complete", {"part_ids": [part]})["file"]["id"], file]
    assert {one["id"] for one in call("GET", "/v1/files")["data"]} == set(sent)
    job = call("POST", "/v1/compressions", {"name": f"{tenant}:j", "files": sent, "codec": "bitdelta"})["id"]
    assert call("GET", "/v1/compressions")["data"][0]["id"] == job
    assert call("GET", f"/v1/compressions/{{compression_id={job}}}")["name"] == f"{tenant}:j"
    assert call("GET", f"/v1/compressions/{{compression_id={job}}}/events")["data"][0]["message"] == "queued"
    assert call("POST", f"/v1/compressions/{{compression_id={job}}}/cancel")["status"] == "cancelled"
    lora = {"lora_name": f"{tenant}:l", "lora_path": "sign.safetensors"}
    assert call("POST", "/v1/load_lora_adapter", lora).startswith("Success")
    assert call("POST", "/v1/unload_lora_adapter", {"lora_name": f"{tenant}:l"}).startswith("Success")
    source = {"uri": (imports / "sign.safetensors").as_uri()}
    assert call("POST", "/v1/loras", {"lora_name": f"{tenant}:l", "source": source})["status"] == "success"
    assert f"{tenant}:l" in call("GET", "/v1/loras")["loras"]
    assert call("DELETE", f"/v1/loras/{{lora_name={tenant}:l}}")["lora_name"] == f"{tenant}:l"
    assert call("GET", "/v1/usage")["object"] == call("GET", "/v1/admin/usage")["object"] == "list"
    assert call("GET", "/v1/admin/audit")["data"][0]["action"] == "model.delete"
    assert call("DELETE", f"/v1/models/{{model={name}@2}}")["deleted"]
    assert call("DELETE", f"/v1/deltas/{{name={name}}}")["deleted"]
    assert call("DELETE", f"/v1/admin/tenants/{{name={tenant}}}")["deleted"]
    assert seen == routes, "what is documented and not asked, or the other way round"
