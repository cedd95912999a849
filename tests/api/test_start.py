"""Who may reach a server that has no key, and what a restart keeps."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_without_a_key_other_machines_are_not_listened_to(tiny_base: Path, tmp_path: Path) -> None:
    words = ["serve", str(tiny_base), "--host", "0.0.0.0", "--port", "0", "--store", str(tmp_path / "store")]
    done = subprocess.run(
        [sys.executable, "-m", "deltaserve", *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert "--host 0.0.0.0" in done.stderr and "--api-key" in done.stderr


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_loopback_is_known_by_its_address(host: str, is_loopback: bool) -> None:
    assert Settings(base="x", host=host).is_loopback is is_loopback


def test_an_open_server_says_so_and_makes_no_keys(start_server: Callable[..., Any]) -> None:
    server = start_server()
    assert "there is no key" in server.printed
    reply = server.http.post("/v1/admin/keys", json={"tenant": "default"})
    assert reply.status_code == 400 and "--api-key" in reply.json()["error"]["message"]
    server.stop()


def test_tenants_keys_and_models_survive_a_restart_and_keys_stay_needed(
    start_server: Callable[..., Any], tenants: dict[str, Any]
) -> None:
    server = start_server(api_key="first-key")
    server.http.post("/v1/admin/tenants", json={"name": "acme"})
    made = [
        server.http.post("/v1/admin/keys", json={"tenant": "acme", "scopes": ["inference", "manage"]}).json()
        for _ in range(2)
    ]
    server.http.headers["Authorization"] = f"Bearer {made[0]['key']}"
    assert server.upload("m", tenants["sign"].artifact).status_code == 201
    server.http.headers["Authorization"] = "Bearer first-key"
    server.http.delete(f"/v1/admin/keys/{made[1]['id']}").raise_for_status()
    server.kill()

    server = start_server("--host", "0.0.0.0")  # there are keys in the store
    server.http.headers["Authorization"] = f"Bearer {made[0]['key']}"
    assert server.http.get("/v1/deltas/m").json()["sha256"] == hashlib.sha256(tenants["sign"].artifact).hexdigest()
    for refused in ("first-key", made[1]["key"], "none"):
        server.http.headers["Authorization"] = f"Bearer {refused}"
        assert server.http.get("/v1/models").status_code == 401
    server.stop()
