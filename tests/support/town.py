"""A server with tenants acme and globex, and an HTTP client for each key."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    import openai


class Town:
    """`town["acme"]` and `town["admin"]` are HTTP clients with that one's key, with the scopes inference and manage."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.keys = [server.api_key]
        self._clients = {"admin": server.http}
        self._own: list[httpx.Client] = []
        self._numbers = itertools.count(1)
        for tenant in ("acme", "globex"):
            self.admin("POST", "tenants", name=tenant)
            self._clients[tenant] = self.client(tenant, "inference", "manage")

    def __getitem__(self, who: str) -> httpx.Client:
        return self._clients[who]

    def admin(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """A call of the admin API that succeeds."""
        sent = {"json": body} if method in ("POST", "PATCH") else {}
        reply = self.server.http.request(method, f"/v1/admin/{path}", **sent)
        assert reply.is_success, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def new_tenant(self, **limits: int) -> str:
        """Its name, of a test's own: names are not given again."""
        name = f"guest-{next(self._numbers)}"
        self.admin("POST", "tenants", name=name, limits=limits)
        return name

    def new_key(self, tenant: str, *scopes: str, **more: Any) -> dict[str, Any]:
        made = self.admin("POST", "keys", tenant=tenant, scopes=scopes, **more)
        self.keys.append(made["key"])
        return made

    def with_key(self, key: str) -> httpx.Client:
        client = httpx.Client(base_url=self.server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        self._own.append(client)
        return client

    def client(self, tenant: str, *scopes: str, **more: Any) -> httpx.Client:
        return self.with_key(self.new_key(tenant, *scopes, **more)["key"])

    def openai(self, tenant: str, *scopes: str) -> openai.OpenAI:
        """The official client with a new key; the caller closes it."""
        return self.server.client(api_key=self.new_key(tenant, *scopes)["key"])

    def upload(self, who: str, name: str, artifact: bytes, **query: str) -> dict[str, Any]:
        reply = self[who].put(f"/v1/deltas/{name}", content=artifact, params=query)
        assert reply.is_success, reply.text
        card: dict[str, Any] = reply.json()
        return card

    def close(self) -> None:
        for client in self._own:
            client.close()
