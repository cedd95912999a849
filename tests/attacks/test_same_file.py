"""Two tenants with the very same file: it is stored and loaded once, and neither learns of the other by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def others(town: Any, tenants: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Two tenants with one file, which nobody else has: `model` of each."""
    raw = tenants["sign"].artifact
    size = int.from_bytes(raw[:8], "little")
    artifact = (size + 8).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * 8 + raw[8 + size :]
    names = town.new_tenant(), town.new_tenant()
    for name in names:
        town.upload("admin", f"{name}:model", artifact)
    yield names
    for name in names:
        town.admin("DELETE", f"tenants/{name}")


def seen(client: Any) -> list[tuple[str, int]]:
    """State and resident bytes on every route that tells them."""
    cards = [client.get("/v1/deltas/model").json(), *client.get("/v1/deltas").json()["data"]]
    cards += client.get("/v1/deltas/model/versions").json()["data"]
    return [(card["state"], card["resident_bytes"]) for card in cards]


def test_a_file_that_another_tenant_has_loaded_looks_as_if_nobody_had(
    town: Any, others: tuple[str, str], process: Any
) -> None:
    """Threat: `state: device` of what one never asked for says that somebody else has the very same weights."""
    one, other = (town.client(name, "inference", "manage") for name in others)
    before = seen(other)
    body = {"model": "model", "prompt": "x", "max_tokens": 1}
    assert one.post("/v1/completions", json=body).status_code == 200
    process.wait_until(lambda: {state for state, _ in seen(one)} == {"device"}, "its own tenant sees it loaded")
    assert seen(other) == before and {state for state, _ in before} == {"disk"}
    assert town["admin"].get(f"/v1/deltas/{others[1]}:model").json()["state"] == "device", "an admin sees what is"
    assert other.post("/v1/completions", json=body).status_code == 200
    assert {state for state, _ in seen(other)} == {"device"}, "who asked is told"


def test_the_same_bytes_are_new_to_who_has_them_not(town: Any, tenants: dict[str, Any]) -> None:
    """Threat: an upload that is acknowledged otherwise, or told of an older version, where another has the file."""
    artifact = tenants["lowrank"].artifact  # globex has it
    guest = town.new_tenant()
    client = town.client(guest, "inference", "manage")
    reply = client.put("/v1/deltas/fresh", content=artifact)
    card = reply.json()
    assert (reply.status_code, card["version"], card["state"], card["owner"]) == (201, 1, "disk", guest)
    assert "globex" not in reply.text
    town.admin("DELETE", f"tenants/{guest}")
    assert town["globex"].post("/v1/completions", json={"model": "secret", "prompt": "x", "max_tokens": 1}).is_success


def test_a_refusal_names_the_model_and_no_file_of_the_server(town: Any) -> None:
    """Threat: names of the server's files and folders in errors."""
    guest = town.new_tenant()
    client = town.client(guest, "inference", "manage")
    told = client.put("/v1/deltas/mine", content=b"x" * 99).json()["error"]["message"]
    assert told.startswith("mine.safetensors: not a safetensors file")
    upload = client.post(
        "/v1/uploads",
        json={"bytes": 99, "filename": "mine.safetensors", "mime_type": "", "purpose": "fine-tune"},
    ).json()["id"]
    part = client.post(f"/v1/uploads/{upload}/parts", files={"data": b"x" * 99}).json()["id"]
    reply = client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [part]})
    assert reply.json()["error"]["message"] == told
    town.admin("DELETE", f"tenants/{guest}")
