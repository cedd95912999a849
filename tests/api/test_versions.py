"""Versions over HTTP: listed, rolled back to, shared out by a canary, guarded by ETags, kept and pinned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

    ErrorOf = Callable[..., dict[str, Any]]


@pytest.fixture
def acme(town: Any, tenants: dict[str, Any]) -> Iterator[httpx.Client]:
    """acme's client; its model `m` has versions 1 (sign), 2 (sparse) and 3 (lowrank), and points to the last."""
    client: httpx.Client = town["acme"]
    for artifact in ("sign", "sparse", "lowrank"):
        town.upload("acme", "m", tenants[artifact].artifact)
    yield client
    client.delete("/v1/deltas/m")


def fingerprint(client: httpx.Client, model: str, **more: Any) -> str:
    body = {"model": model, "prompt": "Many", "max_tokens": 1, "temperature": 0, **more}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["system_fingerprint"]).rpartition("-")[2]


def versions(client: httpx.Client) -> dict[int, str]:
    return {card["version"]: card["sha256"] for card in client.get("/v1/deltas/m/versions").json()["data"]}


def test_versions_are_listed_and_each_can_be_asked(acme: httpx.Client, error_of: ErrorOf) -> None:
    found = versions(acme)
    assert list(found) == [3, 2, 1]
    for number, digest in found.items():
        assert fingerprint(acme, f"m@{number}") == fingerprint(acme, f"acme:m@{number}") == digest[:12]
        assert acme.get(f"/v1/deltas/m@{number}").json()["sha256"] == digest
    assert fingerprint(acme, "m") == found[3][:12]
    error_of(acme.get("/v1/deltas/m@4"), 404, "model_not_found")


def test_a_rollback_moves_the_name_and_the_same_bytes_move_it_back(
    acme: httpx.Client, town: Any, tenants: dict[str, Any]
) -> None:
    found = versions(acme)
    card = acme.patch("/v1/deltas/m", json={"version": 1}).json()
    assert (card["version"], card["active"], card["sha256"]) == (1, 1, found[1])
    assert fingerprint(acme, "m") == found[1][:12]
    assert town.upload("acme", "m", tenants["lowrank"].artifact)["version"] == 3
    assert versions(acme) == found and fingerprint(acme, "m") == found[3][:12]


def test_an_upload_that_does_not_activate_waits_for_a_canary(
    acme: httpx.Client, town: Any, tenants: dict[str, Any]
) -> None:
    card = town.upload("acme", "m", tenants["chatty"].artifact, activate="false")
    assert (card["version"], card["active"]) == (4, 3)
    found = versions(acme)
    assert fingerprint(acme, "m") == found[3][:12]
    card = acme.patch("/v1/deltas/m", json={"canary": {"version": 4, "percent": 50}}).json()
    assert card["canary"] == {"version": 4, "percent": 50}
    answers = [fingerprint(acme, "m", user=f"user-{number}") for number in range(24)]
    assert set(answers) == {found[3][:12], found[4][:12]}
    assert answers == [fingerprint(acme, "m", user=f"user-{number}") for number in range(24)], "a user stays on a side"
    assert acme.patch("/v1/deltas/m", json={"canary": None}).json()["canary"] is None
    assert {fingerprint(acme, "m", user=f"user-{number}") for number in range(24)} == {found[3][:12]}


def test_what_cannot_be_changed_says_who_holds_it(acme: httpx.Client, error_of: ErrorOf) -> None:
    acme.patch("/v1/deltas/m", json={"canary": {"version": 2, "percent": 5}}).raise_for_status()
    message = error_of(acme.request("DELETE", "/v1/deltas/m@3"), 409, "version_in_use")["message"]
    assert message == "m points to version 3; move it first"
    message = error_of(acme.request("DELETE", "/v1/deltas/m@2"), 409, "version_in_use")["message"]
    assert message == "the canary of m points to version 2; move it first"
    etag = acme.get("/v1/deltas/m").headers["etag"]
    error = error_of(acme.patch("/v1/deltas/m@1", json={"pinned": True}), 400, "invalid_request")
    assert error["param"] == "name"
    assert acme.get("/v1/deltas/m").headers["etag"] == etag


def test_versions_beyond_the_bound_go_but_not_those_in_use(
    acme: httpx.Client, town: Any, tenants: dict[str, Any], error_of: ErrorOf
) -> None:
    acme.patch("/v1/deltas/m", json={"version": 1})
    town.upload("acme", "m", tenants["chatty"].artifact, activate="false")
    assert list(versions(acme)) == [4, 3, 2, 1], "three stay, and the one that the name points to"
    acme.patch("/v1/deltas/m", json={"version": 4})
    acme.delete("/v1/deltas/m@2").raise_for_status()
    assert list(versions(acme)) == [4, 3, 1]
    reply = acme.delete("/v1/deltas/m@4")
    error_of(reply, 409, "version_in_use")
    assert reply.headers["x-should-retry"] == "false"


def test_a_change_that_was_not_seen_is_not_overwritten(
    acme: httpx.Client, tenants: dict[str, Any], error_of: ErrorOf
) -> None:
    etag = acme.get("/v1/deltas/m").headers["etag"]
    changed = acme.patch("/v1/deltas/m", json={"version": 2}, headers={"If-Match": etag})
    assert changed.status_code == 200 and changed.headers["etag"] != etag
    late = {"If-Match": etag}
    sparse = tenants["sparse"].artifact
    error_of(acme.patch("/v1/deltas/m", json={"version": 1}, headers=late), 412, "precondition_failed")
    error_of(acme.delete("/v1/deltas/m", headers=late), 412, "precondition_failed")
    error_of(acme.put("/v1/deltas/m", content=sparse, headers=late), 412, "precondition_failed")
    error_of(acme.put("/v1/deltas/m", content=sparse, headers={"If-None-Match": "*"}), 412, "precondition_failed")
    error_of(acme.put("/v1/deltas/new", content=sparse, headers={"If-Match": "*"}), 412, "precondition_failed")
    assert acme.get("/v1/deltas/m").headers["etag"] == changed.headers["etag"]


def test_a_pinned_model_is_loaded_without_being_asked(acme: httpx.Client, process: Any) -> None:
    card = acme.patch("/v1/deltas/m", json={"pinned": True}).json()
    assert card["pinned"] is True
    process.wait_until(lambda: acme.get("/v1/deltas/m").json()["state"] == "device", "it is on the device")
    assert acme.patch("/v1/deltas/m", json={"pinned": False}).json()["pinned"] is False


def test_one_slot_stays_free_of_pinned_models_and_a_restart_pins_again(
    start_server: Callable[..., Any], tenants: dict[str, Any], process: Any, error_of: ErrorOf
) -> None:
    server = start_server("--max-deltas", "2")
    for name in ("sign", "sparse"):
        server.upload(name, tenants[name].artifact)
    assert server.http.patch("/v1/deltas/sign", json={"pinned": True}).status_code == 200
    error_of(server.http.patch("/v1/deltas/sparse", json={"pinned": True}), 400, "invalid_request")
    assert server.http.get("/v1/deltas/sparse").json()["pinned"] is False
    late = {"If-Match": '"0-0"'}
    server.http.patch("/v1/deltas/sign", json={"pinned": False}).raise_for_status()
    error_of(server.http.patch("/v1/deltas/sparse", json={"pinned": True}, headers=late), 412, "precondition_failed")
    server.http.patch("/v1/deltas/sign", json={"pinned": True}).raise_for_status()
    server.kill()
    server = start_server("--max-deltas", "2")
    process.wait_until(lambda: server.http.get("/v1/deltas/sign").json()["state"] == "device", "it is on the device")
    server.stop()


def test_a_version_can_be_brought_in_before_it_is_used(acme: httpx.Client, process: Any) -> None:
    reply = acme.post("/v1/deltas/m@2/prewarm")
    assert (reply.status_code, reply.json()["version"]) == (202, 2)
    process.wait_until(lambda: acme.get("/v1/deltas/m@2").json()["state"] == "device", "it is on the device")


@pytest.mark.parametrize(
    "body",
    [
        {"version": 0},
        {"version": "1"},
        {"canary": {"version": 1}},
        {"canary": {"version": 1, "percent": 0}},
        {"canary": {"version": 1, "percent": 100.1}},
        {"pinned": "yes"},
        {"owner": "globex"},
        {"shared_with": "globex"},
    ],
)
def test_a_change_that_makes_no_sense_is_refused(acme: httpx.Client, body: dict[str, Any]) -> None:
    assert acme.patch("/v1/deltas/m", json=body).status_code == 400


def test_sharing_is_an_admins_and_shows_no_more_than_the_model(
    acme: httpx.Client, town: Any, error_of: ErrorOf
) -> None:
    globex = town["globex"]
    error_of(acme.patch("/v1/deltas/m", json={"shared_with": ["globex"]}), 403, "insufficient_permissions")
    error_of(town["admin"].patch("/v1/deltas/acme:m", json={"shared_with": ["nobody"]}), 404, "not_found")
    town["admin"].patch("/v1/deltas/acme:m", json={"shared_with": ["globex"]}).raise_for_status()
    try:
        assert [card["id"] for card in globex.get("/v1/models").json()["data"]] == ["tiny", "mine", "secret", "acme:m"]
        card = globex.get("/v1/deltas/acme:m").json()
        assert card["id"] == "acme:m" and not card.keys() & {"shared_with", "canary", "pinned", "active"}
        assert fingerprint(globex, "acme:m") == card["sha256"][:12]
        for reply in (
            globex.patch("/v1/deltas/acme:m", json={"version": 1}),
            globex.delete("/v1/deltas/acme:m"),
            globex.delete("/v1/models/acme:m"),
        ):
            error_of(reply, 403, "insufficient_permissions")
        error_of(globex.get("/v1/deltas/m"), 404, "model_not_found")
    finally:
        town["admin"].patch("/v1/deltas/acme:m", json={"shared_with": []}).raise_for_status()
    error_of(globex.get("/v1/deltas/acme:m"), 404, "model_not_found")
