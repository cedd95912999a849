"""Models that are to live for a while; lists that are read page by page."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "lifetime-admin"


def test_a_model_is_deleted_when_its_time_is_up(
    start_server: Callable[..., Any], tenants: dict[str, Any], error_of: Callable[..., dict[str, Any]], process: Any
) -> None:
    server = start_server(api_key=KEY)
    for name in ("short", "long", "kept"):
        assert server.upload(name, tenants["sign"].artifact).json()["expires_at"] is None
    card = server.http.patch("/v1/deltas/short", json={"expires_in_s": 1}).json()
    assert card["expires_at"] == pytest.approx(time.time(), abs=30)
    assert server.http.patch("/v1/deltas/long", json={"expires_in_s": 3600}).json()["expires_at"] > time.time() + 3000
    server.http.patch("/v1/deltas/kept", json={"expires_in_s": 1}).raise_for_status()
    assert server.http.patch("/v1/deltas/kept", json={"expires_in_s": None}).json()["expires_at"] is None
    assert server.http.patch("/v1/deltas/long", json={"pinned": False}).json()["expires_at"], "what is left out stays"
    for wrong in (0, -1, 1.5, 10**12):
        error_of(server.http.patch("/v1/deltas/long", json={"expires_in_s": wrong}), 400, "invalid_request")
    process.wait_until(lambda: time.time() > card["expires_at"], "its time is up")
    for method, path in (("GET", "/v1/deltas/short"), ("GET", "/v1/models/short@1"), ("DELETE", "/v1/deltas/short")):
        error_of(server.http.request(method, path), 404, "model_not_found")
    error_of(server.http.post("/v1/completions", json={"model": "short", "prompt": "a"}), 404, "model_not_found")
    assert [one["id"] for one in server.http.get("/v1/deltas").json()["data"]] == ["kept", "long"]
    again = server.http.put("/v1/deltas/short", content=tenants["sparse"].artifact, headers={"If-None-Match": "*"})
    assert (again.status_code, again.json()["version"], again.json()["expires_at"]) == (201, 1, None)
    card = server.http.patch("/v1/deltas/short", json={"expires_in_s": 1}).json()
    assert server.stop() == 0
    process.wait_until(lambda: time.time() > card["expires_at"], "its time is up")
    server = start_server(api_key=KEY)
    error_of(server.http.get("/v1/deltas/short"), 404, "model_not_found")
    assert [one["id"] for one in server.http.get("/v1/deltas").json()["data"]] == ["kept", "long"]
    entry = server.http.get("/v1/admin/audit?limit=1").json()["data"][0]
    assert [entry[what] for what in ("who", "action", "object")] == ["server/expiry", "model.delete", "default:short"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/deltas", "/v1/admin/tenants", "/v1/admin/keys"])
def test_a_list_is_the_same_page_by_page(path: str, town: Any, error_of: Callable[..., dict[str, Any]]) -> None:
    http = town["admin"]
    whole = http.get(path).json()
    ids = [one["id"] for one in whole["data"]]
    assert len(ids) >= 2 and not whole["has_more"] and [whole["first_id"], whole["last_id"]] == [ids[0], ids[-1]]
    seen: list[str] = []
    has_more = True
    while has_more:
        query = {"limit": "1", **({"after": seen[-1]} if seen else {})}
        reply = http.get(path, params=query).json()
        seen += [one["id"] for one in reply["data"]]
        has_more = reply["has_more"]
        assert reply["last_id"] == seen[-1] and len(reply["data"]) <= 1
    assert seen == ids
    end = http.get(path, params={"after": ids[-1]}).json()
    assert (end["data"], end["has_more"], end["last_id"]) == ([], False, None)
    assert error_of(http.get(path, params={"after": "nothing"}), 400, "invalid_request")["param"] == "after"
    for limit in ("0", "-1", "x", "10001"):
        error_of(http.get(path, params={"limit": limit}), 400, "invalid_request")


def test_a_page_cannot_begin_after_what_one_may_not_see(town: Any, error_of: Callable[..., dict[str, Any]]) -> None:
    for name in ("secret", "globex:secret", "globex:mine"):
        error_of(town["acme"].get("/v1/models", params={"after": name}), 400, "invalid_request")
