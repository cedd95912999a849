"""Every route of the OpenAPI document × a wrong caller: another tenant's model is the same reply as none, and a caller
without a key, or with one for something else, learns nothing at all."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

OPEN = {("GET", "/health")}
# What acme may call globex's models, and the same for models that nobody has.
SPELLINGS = [
    ("secret", "absent"),
    ("secret@1", "absent@1"),
    ("globex:secret", "globex:absent"),
    ("globex:secret@1", "globex:absent@1"),
    ("globex:mine", "globex:absent"),
    ("globex:secret", "nobody:absent"),
]


class Api:
    """What the server says of itself, as requests that can be sent."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._schemas = document["components"]["schemas"]
        self.routes = {
            (method.upper(), path): operation
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        }

    def request(self, method: str, path: str, model: str) -> dict[str, Any]:
        """Arguments for httpx: each parameter of the path and each `model`, `name`, `id` of the body is `model`."""
        url = re.sub(r"\{[^}]*\}", quote(model, safe=""), path)
        body = self.routes[method, path].get("requestBody")
        if body is None:
            return {"method": method, "url": url}
        if "multipart/form-data" in body["content"]:
            fields = body["content"]["multipart/form-data"]["schema"]["properties"]
            name = next(name for name, field in fields.items() if field.get("format") == "binary")
            return {"method": method, "url": url, "files": {name: b"user"}}
        if "application/octet-stream" in body["content"]:
            return {"method": method, "url": url, "content": b"user"}
        value = self._value(body["content"]["application/json"]["schema"], model)
        return {"method": method, "url": url, "json": value}

    def _value(self, schema: dict[str, Any], model: str, name: str = "") -> Any:
        """A small instance of a schema: what must be there, what names something, and what a message says."""
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        for choice in schema.get("anyOf", schema.get("oneOf", [])):
            return self._value(choice, model, name)
        if "enum" in schema or "const" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        match schema.get("type"):
            case "object":
                needed = schema.get("required", [])
                named = {"model", "name", "tenant", "id", "content"} & schema.get("properties", {}).keys()
                fields = {key: schema["properties"][key] for key in {*needed, *named}}
                return {key: self._value(value, model, key) for key, value in fields.items()}
            case "array":
                return [self._value(schema["items"], model)] if schema.get("minItems") else []
            case "integer" | "number":
                return schema.get("minimum", 1)
            case "boolean":
                return True
        return model if name in ("model", "name", "tenant", "id") else "user"


@pytest.fixture(scope="module")
def api(town: Any) -> Api:
    return Api(town["admin"].get("/openapi.json").json())


def answers(reply: httpx.Response, model: str) -> tuple[Any, ...]:
    """All that a reply tells, with the model's name taken out."""
    told = re.sub(r"\btmp\w{8}\b", "FILE", json.dumps(reply.text))  # what the server called the upload
    for spelled in (model, model.replace(":", "%3A").replace("@", "%40"), model.partition("@")[0]):
        told = told.replace(spelled, "…")
    ignored = ("x-request-id", "date", "content-length")
    return reply.status_code, told, {key: value for key, value in reply.headers.items() if key not in ignored}


def secrets_of(town: Any) -> set[str]:
    cards = town["globex"].get("/v1/deltas").json()["data"]
    return {value for card in cards for value in (card["sha256"], card["sha256"][:12])}


def test_the_document_names_the_routes_that_there_are(api: Api) -> None:
    paths = {path for _, path in api.routes}
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models/{model}",
        "/v1/deltas/{name}",
        "/v1/admin/keys",
        "/v1/uploads/{upload_id}/parts",
    } <= paths
    assert len(api.routes) >= 20


@pytest.mark.parametrize(("theirs", "absent"), SPELLINGS)
def test_another_tenants_model_answers_like_none_on_every_route(api: Api, town: Any, theirs: str, absent: str) -> None:
    before = town["globex"].get("/v1/deltas").json()
    hidden = secrets_of(town) - {card["sha256"] for card in town["acme"].get("/v1/deltas").json()["data"]}
    for method, path in api.routes:
        one, none = (town["acme"].request(**api.request(method, path, model)) for model in (theirs, absent))
        assert answers(one, theirs) == answers(none, absent), (method, path)
        assert one.status_code < 500, (method, path, one.text)
        if "{" in path:
            assert one.status_code in (403, 404, 400, 422), (method, path, one.text)
        assert not any(secret in one.text for secret in hidden), (method, path)
    assert town["globex"].get("/v1/deltas").json() == before, "and nothing was changed"


def test_the_same_requests_reach_ones_own_model(api: Api, town: Any) -> None:
    """The test above asks what would work: the owner gets past each 404."""
    reached = set()
    for method, path in sorted(api.routes):
        if method in ("GET", "POST") and "/admin/" not in path:
            reply = town["globex"].request(**api.request(method, path, "secret"))
            if reply.is_success:
                reached.add(path)
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models/{model}",
        "/v1/deltas/{name}",
        "/v1/deltas/{name}/versions",
        "/v1/deltas/{name}/prewarm",
    } <= reached


def test_another_tenants_upload_answers_like_none_on_every_route(api: Api, town: Any) -> None:
    """Whose id somebody saw in a log: it opens nothing, and tells nothing."""
    body = {"bytes": 4, "filename": "stolen.safetensors", "mime_type": "", "purpose": "fine-tune"}
    upload = town["globex"].post("/v1/uploads", json=body).json()["id"]
    part = town["globex"].post(f"/v1/uploads/{upload}/parts", files={"data": b"user"}).json()["id"]
    before = town["globex"].get(f"/v1/uploads/{upload}").json()
    absent = f"upload_{'0' * 32}"
    routes = [route for route in api.routes if "{upload_id}" in route[1]]
    assert len(routes) == 4
    for method, path in routes:
        one, none = (api.request(method, path, upload_id) for upload_id in (upload, absent))
        for request in (one, none):
            if "part_ids" in request.get("json", {}):
                request["json"]["part_ids"] = [part]
        replies = [town["acme"].request(**request) for request in (one, none)]
        assert [reply.status_code for reply in replies] == [404, 404], (method, path, replies[0].text)
        assert answers(replies[0], upload) == answers(replies[1], absent), (method, path)
    assert town["globex"].get(f"/v1/uploads/{upload}").json() == before
    assert town["globex"].post(f"/v1/uploads/{upload}/cancel").status_code == 200


def test_another_tenants_file_and_job_answer_like_none_on_every_route(
    api: Api, town: Any, jobs: ModuleType, tiny_finetune: Path
) -> None:
    """And their files make no job of one's own."""
    form: dict[str, Any] = {"data": {"purpose": "user_data"}, "files": {"file": ("config.json", b"{}")}}
    file = town["globex"].post("/v1/files", **form).json()["id"]
    job = jobs.create(town["globex"], "theirs", jobs.send(town["globex"], tiny_finetune), codec="bitdelta")["id"]
    assert town["globex"].post(f"/v1/compressions/{job}/cancel").status_code == 200
    before = town["globex"].get("/v1/compressions").json()
    for name, theirs, absent, count in (
        ("{file_id}", file, f"file-{'0' * 32}", 2),
        ("{compression_id}", job, f"compression-{'0' * 32}", 3),
    ):
        routes = [route for route in api.routes if name in route[1]]
        assert len(routes) == count
        for method, path in routes:
            one, none = (town["acme"].request(**api.request(method, path, key)) for key in (theirs, absent))
            assert (one.status_code, none.status_code) == (404, 404), (method, path, one.text)
            assert answers(one, theirs) == answers(none, absent), (method, path)
    one, none = (
        town["acme"].post("/v1/compressions", json={"name": "m", "files": [key]}) for key in (file, f"file-{'0' * 32}")
    )
    assert one.status_code == 404 and answers(one, file) == answers(none, f"file-{'0' * 32}")
    assert town["acme"].get("/v1/compressions", params={"after": job}).status_code == 404
    assert town["acme"].get("/v1/compressions").json()["data"] == town["acme"].get("/v1/files").json()["data"] == []
    assert town["globex"].get("/v1/compressions").json() == before
    assert town["globex"].delete(f"/v1/files/{file}").status_code == 200


def wrong_callers(town: Any) -> Iterator[tuple[str, httpx.Client, int]]:
    ended = town.new_key("globex", "inference", "manage")
    town.admin("DELETE", f"keys/{ended['id']}")
    with httpx.Client(base_url=town.server.url) as stranger:
        yield "without a key", stranger, 401
    yield "with a revoked key", town.with_key(ended["key"]), 401
    yield "with a wrong key", town.with_key(ended["key"][:-1]), 401
    yield "with a key for metrics", town.client("globex", "metrics"), 403


def test_a_wrong_caller_gets_one_answer_on_every_route(api: Api, town: Any) -> None:
    for who, client, status in wrong_callers(town):
        for method, path in api.routes:
            if (method, path) in OPEN or (status == 403 and path in ("/metrics", "/version")):
                continue
            reply = client.request(**api.request(method, path, "secret"))
            assert reply.status_code == status, (who, method, path, reply.text)


def test_a_tenant_id_that_the_caller_writes_is_not_believed(town: Any) -> None:
    smuggled = {"OpenAI-Organization": "globex", "OpenAI-Project": "globex", "X-Tenant-ID": "globex", "X-Tenant": "2"}
    assert town["acme"].get("/v1/deltas/secret", headers=smuggled).status_code == 404
    body = {"model": "secret", "prompt": "x", "max_tokens": 1, "user": "globex"}
    assert town["acme"].post("/v1/completions", json=body, headers=smuggled).status_code == 404
    for field in ("tenant", "owner", "cache_salt"):
        reply = town["acme"].post("/v1/completions", json={**body, "model": "mine", field: "globex"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_parameter")


def test_lists_hold_ones_own_and_the_base(town: Any) -> None:
    assert [card["id"] for card in town["acme"].get("/v1/models").json()["data"]] == ["tiny", "mine"]
    assert [card["id"] for card in town["acme"].get("/v1/deltas").json()["data"]] == ["mine"]
    every = [card["id"] for card in town["admin"].get("/v1/models").json()["data"]]
    ours = [name for name in every if not name.startswith("guest-")]  # of other tests in the same town
    assert ours == ["tiny", "acme:mine", "globex:mine", "globex:secret"]
    mine = {who: town[who].get("/v1/deltas/mine").json()["sha256"] for who in ("acme", "globex")}
    assert mine["acme"] != mine["globex"]
