"""Tenants and keys through the admin API and the command line; a change counts from the next request on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    ErrorOf = Callable[..., dict[str, Any]]


@pytest.fixture
def visitor(town: Any) -> Iterator[str]:
    """A tenant that a test may do with what it likes."""
    name: str = town.new_tenant()
    yield name
    if town.server.http.get(f"/v1/admin/tenants/{name}").is_success:
        town.admin("DELETE", f"tenants/{name}")


def test_tenants_are_made_listed_and_deleted_with_all_they_had(
    town: Any, visitor: str, tenants: dict[str, Any], error_of: ErrorOf
) -> None:
    client = town.client(visitor, "inference", "manage")
    assert client.put("/v1/deltas/m", content=tenants["sign"].artifact).status_code == 201
    listed = {tenant["id"]: tenant for tenant in town.admin("GET", "tenants")["data"]}
    assert listed.keys() >= {"acme", "default", "globex", visitor} and listed[visitor]["models"] == 1
    error_of(town.server.http.post("/v1/admin/tenants", json={"name": visitor}), 409, "name_conflict")

    assert town.admin("DELETE", f"tenants/{visitor}")["deleted"] is True
    error_of(client.get("/v1/models"), 401, "invalid_api_key")
    error_of(town.server.http.get(f"/v1/deltas/{visitor}:m"), 404, "model_not_found")
    error_of(town.server.http.get(f"/v1/admin/tenants/{visitor}"), 404, "not_found")
    error_of(town.server.http.post("/v1/admin/tenants", json={"name": visitor}), 409, "name_conflict")
    error_of(town.server.http.delete("/v1/admin/tenants/default"), 409, "name_conflict")
    assert town["acme"].get("/v1/deltas/mine").status_code == 200, "the same bytes of another tenant stay"


def test_deleting_a_tenant_lets_its_running_request_finish(town: Any, visitor: str, tenants: dict[str, Any]) -> None:
    town.upload("admin", f"{visitor}:m", tenants["sign"].artifact)
    wanted = {"prompt": "Many", "temperature": 0, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
    with town.openai("acme", "inference") as acme, town.openai(visitor, "inference") as client:
        expected = acme.completions.create(model="mine", **wanted).choices[0].text
        stream = client.completions.create(model="m", stream=True, **wanted)
        text = next(iter(stream)).choices[0].text
        town.admin("DELETE", f"tenants/{visitor}")
        assert text + "".join(chunk.choices[0].text for chunk in stream) == expected


def test_a_key_is_told_once_and_revoked_at_once(town: Any, error_of: ErrorOf) -> None:
    made = town.new_key("acme", "inference", label="app")
    client = town.with_key(made["key"])
    assert client.get("/v1/models").status_code == 200
    (listed,) = [key for key in town.admin("GET", "keys?tenant=acme")["data"] if key["id"] == made["id"]]
    assert "key" not in listed and (listed["tenant"], listed["scopes"]) == ("acme", ["inference"])
    town.admin("DELETE", f"keys/{made['id']}")
    error_of(client.get("/v1/models"), 401, "invalid_api_key")


def test_a_rotated_key_has_the_rights_of_the_old_one(town: Any, error_of: ErrorOf) -> None:
    made = town.new_key("acme", "inference")
    after = town.admin("POST", f"keys/{made['id']}/rotate")
    town.keys.append(after["key"])
    error_of(town.with_key(made["key"]).get("/v1/models"), 401, "invalid_api_key")
    client = town.with_key(after["key"])
    assert client.get("/v1/deltas/mine").status_code == 200
    error_of(client.delete("/v1/deltas/mine"), 403, "insufficient_permissions")


SCOPED = [
    ("POST", "/v1/completions", {"inference"}),
    ("POST", "/v1/chat/completions", {"inference"}),
    ("GET", "/v1/models", {"inference", "manage"}),
    ("GET", "/v1/deltas", {"inference", "manage"}),
    ("GET", "/v1/deltas/x", {"inference", "manage"}),
    ("PUT", "/v1/deltas/x", {"manage"}),
    ("DELETE", "/v1/deltas/x", {"manage"}),
    ("DELETE", "/v1/models/x", {"manage"}),
    ("GET", "/metrics", {"metrics"}),
    ("GET", "/version", {"inference", "manage", "metrics"}),
    ("GET", "/v1/admin/tenants", set()),
    ("GET", "/v1/admin/keys", set()),
    ("POST", "/v1/admin/keys", set()),
    ("GET", "/v1/admin/audit", set()),
]


@pytest.mark.parametrize("scope", ["inference", "manage", "metrics", "admin"])
def test_a_scope_opens_its_routes_and_no_others(town: Any, scope: str) -> None:
    client = town.client("acme", scope)
    body = {"json": {"model": "x", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}}
    for method, path, scopes in SCOPED:
        reply = client.request(method, path, **(body if method == "POST" else {}))
        is_open = scope in scopes or scope == "admin"
        assert (reply.status_code != 403) == is_open, (method, path, reply.text)
        if not is_open:
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "insufficient_permissions")


@pytest.mark.parametrize(
    "body",
    [
        {"tenant": "acme", "scopes": []},
        {"tenant": "acme", "scopes": ["root"]},
        {"tenant": "acme", "scopes": "admin"},
        {"tenant": "acme", "expires_in_s": 0},
        {"tenant": "acme", "expires_in_s": 10**12},
        {"tenant": "acme", "owner": "globex"},
        {"tenant": "acme", "label": "x" * 129},
        {"scopes": ["inference"]},
    ],
)
def test_a_key_that_makes_no_sense_is_refused(town: Any, body: dict[str, Any]) -> None:
    assert town.server.http.post("/v1/admin/keys", json=body).status_code == 400


def test_every_change_is_in_the_log(town: Any, visitor: str, tenants: dict[str, Any]) -> None:
    made = town.new_key(visitor, "manage")
    client = town.with_key(made["key"])
    card = client.put("/v1/deltas/m", content=tenants["sign"].artifact).json()
    client.delete("/v1/deltas/m")
    entries = town.admin("GET", "audit?limit=4")["data"]
    who = f"{visitor}/{made['id']}"
    assert [(entry["who"], entry["action"], entry["object"], entry["digest"]) for entry in entries] == [
        (who, "model.delete", f"{visitor}:m", card["sha256"]),
        (who, "model.upload", f"{visitor}:m@1", card["sha256"]),
        ("default/bootstrap", "key.create", who, None),
        ("default/bootstrap", "tenant.create", visitor, None),
    ]
    older = town.admin("GET", f"audit?before={entries[0]['id']}&limit=3")["data"]
    assert older == entries[1:]


def test_the_command_line_does_the_same(
    town: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaserve.cli import main

    monkeypatch.setenv("DELTASERVE_URL", town.server.url)
    monkeypatch.setenv("DELTASERVE_API_KEY", town.server.api_key)

    def run(*words: str, status: int = 0) -> str:
        assert main(list(words)) == status
        out, err = capsys.readouterr()
        return out if not status else err

    assert run("tenant", "create", "shop").startswith("created shop\n")
    key = run("key", "create", "shop", "--scope", "manage", "--label", "ci", "--expires-in-days", "7").strip()
    town.keys.append(key)
    client = town.with_key(key)
    assert client.get("/v1/models").status_code == 200
    (listed,) = json.loads(run("key", "list", "shop", "--json"))
    assert (listed["label"], listed["scopes"], listed["expires"] - listed["created"]) == ("ci", ["manage"], 7 * 86400)
    assert "ci" in run("key", "list", "shop") and "shop" in run("tenant", "list")
    rotated = run("key", "rotate", listed["id"]).strip()
    town.keys.append(rotated)
    assert client.get("/v1/models").status_code == 401
    assert run("key", "revoke", town.with_key(rotated).get("/v1/models").is_success and rotated[3:19]).startswith(
        "revoked"
    )
    assert run("tenant", "delete", "shop") == "deleted shop\n"
    assert json.loads(run("audit", "--limit", "1"))["action"] == "tenant.delete"
    assert "there is no tenant 'shop'" in run("tenant", "delete", "shop", status=1)
    monkeypatch.setenv("DELTASERVE_API_KEY", town.new_key("acme", "manage")["key"])
    assert "lacks the scope admin" in run("tenant", "list", status=1)
