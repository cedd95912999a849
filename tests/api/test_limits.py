"""A tenant's limits over HTTP: what it stores, how often and how much it asks; and its bill."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

    ErrorOf = Callable[..., dict[str, Any]]

BODY = {"model": "tiny", "prompt": "Many", "max_tokens": 2, "temperature": 0}


class Guest:
    """A tenant of the test's own, and its client."""

    def __init__(self, town: Any) -> None:
        self.town = town
        self.name = town.new_tenant()
        self.http: httpx.Client = town.client(self.name, "inference", "manage")

    def limit(self, **limits: int | None) -> dict[str, Any]:
        changed: dict[str, Any] = self.town.admin("PATCH", f"tenants/{self.name}", limits=limits)["limits"]
        return changed

    def ask(self, **more: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={**BODY, **more})

    def put(self, name: str, artifact: bytes) -> httpx.Response:
        return self.http.put(f"/v1/deltas/{name}", content=artifact)


@pytest.fixture
def guest(town: Any) -> Iterator[Guest]:
    made = Guest(town)
    yield made
    town.admin("DELETE", f"tenants/{made.name}")


def test_requests_a_minute(guest: Guest, error_of: ErrorOf) -> None:
    assert guest.ask().status_code == 200 and "x-ratelimit-limit-requests" not in guest.ask().headers
    guest.limit(requests_per_minute=2)
    replies = [guest.ask() for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["1", "0", "0"]
    assert error_of(replies[2], 429, "rate_limit_exceeded")["type"] == "rate_limit_error"
    assert 1 <= int(replies[2].headers["retry-after"]) <= 30
    assert guest.limit(requests_per_minute=None)["requests_per_minute"] is None
    assert guest.ask().status_code == 200
    assert guest.town["acme"].post("/v1/completions", json=BODY).status_code == 200, "the others' are their own"


def test_tokens_a_minute_count_prompt_and_answer(guest: Guest, error_of: ErrorOf) -> None:
    guest.limit(tokens_per_minute=1000)
    usage = guest.ask(max_tokens=40, n=2, ignore_eos=True).json()["usage"]
    reply = guest.ask(max_tokens=1)
    spent = usage["total_tokens"] + reply.json()["usage"]["prompt_tokens"]
    left = int(reply.headers["x-ratelimit-remaining-tokens"])
    assert 1000 - spent <= left < 1000 - usage["prompt_tokens"], "less what has flowed in since"
    guest.limit(tokens_per_minute=10)
    reply = guest.ask(prompt="Many " * 100, max_tokens=1)
    assert reply.status_code == 429 and "tokens a minute" in error_of(reply, 429, "rate_limit_exceeded")["message"]


def test_a_stream_spends_as_it_goes_and_a_client_that_leaves_pays_for_what_it_got(guest: Guest, process: Any) -> None:
    guest.limit(tokens_per_minute=100_000, max_concurrent=16)
    body = {**BODY, "n": 16, "temperature": 1, "max_tokens": 480, "stream": True, "ignore_eos": True}
    with guest.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # held: when it is let go, so is the connection
        next(lines)
        assert "x-ratelimit-remaining-tokens" in stream.headers
        assert guest.ask().status_code == 429
        lines.close()
    process.wait_until(lambda: guest.ask(max_tokens=1).status_code == 200, "the place is free again")
    (line,) = guest.http.get("/v1/usage").json()["data"]
    assert 16 <= line["completion_tokens"] < 16 * 400


def test_sequences_at_once(guest: Guest, error_of: ErrorOf) -> None:
    guest.limit(max_concurrent=2)
    assert guest.ask(n=2, temperature=1).status_code == 200
    assert error_of(guest.ask(n=3, temperature=1), 400, "invalid_request")["param"] == "n"
    assert guest.ask(prompt=["a", "b"]).status_code == 200
    assert guest.ask(prompt=["a", "b", "c"]).status_code == 400


def test_tokens_of_an_answer(guest: Guest, error_of: ErrorOf) -> None:
    guest.limit(max_tokens=3)
    assert error_of(guest.ask(max_tokens=4), 400, "invalid_request")["param"] == "max_tokens"
    assert guest.ask(max_tokens=3).status_code == 200
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
    reply = guest.http.post("/v1/chat/completions", json=body)
    assert reply.json()["usage"]["completion_tokens"] == 3, "who names no length gets the tenant's"
    assert guest.http.post("/v1/chat/completions", json={**body, "max_completion_tokens": 4}).status_code == 400


def test_models_and_bytes(guest: Guest, tenants: dict[str, Any], error_of: ErrorOf) -> None:
    sign, sparse = tenants["sign"].artifact, tenants["sparse"].artifact
    guest.limit(max_models=1)
    assert guest.put("a", sign).status_code == 201
    error_of(guest.put("b", sparse), 403, "quota_exceeded")
    assert guest.put("a", sparse).status_code == 200, "a version is no new model"
    guest.limit(max_models=None, max_bytes=len(sign) + len(sparse))
    assert guest.put("b", sign).status_code == 201, "the same bytes count once"
    held = guest.http.get("/v1/usage").json()
    assert (held["models"], held["bytes"]) == (2, len(sign) + len(sparse))
    chatty = tenants["chatty"].artifact
    message = error_of(guest.put("a", chatty), 403, "quota_exceeded")["message"]
    assert str(held["bytes"] + len(chatty)) in message
    assert guest.http.get("/v1/deltas/a").json()["version"] == 2, "nothing of it was kept"
    guest.http.delete("/v1/deltas/a@1").raise_for_status()
    guest.limit(max_bytes=len(sign) - 1)
    error_of(guest.put("c", sign), 413, "artifact_too_large")
    error_of(guest.http.put("/v1/deltas/c", content=iter([sign])), 413, "artifact_too_large")


def test_sequences_that_wait(guest: Guest, error_of: ErrorOf) -> None:
    many = {"prompt": ["Many"] * 5, "n": 16, "max_tokens": 1}  # more than there are seats
    assert guest.ask(**many).status_code == 200
    assert guest.limit(max_queued=0)["max_queued"] == 0
    reply = guest.ask(**many)
    assert (
        "at most 0 of one tenant may" in error_of(reply, 429, "queue_full")["message"]
        and "retry-after" in reply.headers
    )
    assert guest.ask().status_code == 200, "who finds a seat does not wait"


def test_models_on_the_device(guest: Guest, tenants: dict[str, Any], error_of: ErrorOf, process: Any) -> None:
    sizes = {name: guest.put(name, tenants[name].artifact).json()["resident_bytes"] for name in ("sign", "sparse")}
    for name in sizes:  # once loaded, what they weigh is known better
        guest.ask(model=name).raise_for_status()
        sizes[name] = guest.http.get(f"/v1/deltas/{name}").json()["resident_bytes"]
    guest.limit(max_resident_bytes=sum(sizes.values()) - 1)
    body = {**BODY, "model": "sign", "max_tokens": 480, "stream": True, "ignore_eos": True, "n": 8, "temperature": 1}
    with guest.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        reply = guest.ask(model="sparse")
        error_of(reply, 429, "rate_limit_exceeded")
        assert "retry-after" in reply.headers
        assert guest.ask(model="sign").status_code == guest.ask().status_code == 200
        lines.close()
    process.wait_until(lambda: guest.ask(model="sparse").status_code == 200, "what is idle makes room")

    assert guest.http.patch("/v1/deltas/sign", json={"pinned": True}).status_code == 200
    error_of(guest.ask(model="sparse"), 403, "quota_exceeded")
    error_of(guest.http.patch("/v1/deltas/sparse", json={"pinned": True}), 403, "quota_exceeded")
    assert guest.http.get("/v1/deltas/sparse").json()["pinned"] is False
    assert guest.ask(model="sign").status_code == guest.ask().status_code == 200
    assert guest.http.patch("/v1/deltas/sign", json={"pinned": False}).status_code == 200
    assert guest.ask(model="sparse").status_code == 200


def test_the_bill_agrees_with_the_replies_and_is_ones_own(
    guest: Guest, tenants: dict[str, Any], error_of: ErrorOf
) -> None:
    guest.put("m", tenants["sign"].artifact)
    spent = [
        guest.ask(model=model, n=n, temperature=1).json()["usage"]
        for model in ("m", f"{guest.name}:m@1")
        for n in (1, 2)
    ]
    guest.ask()
    guest.ask(model="nothing")
    report = guest.http.get("/v1/usage").json()
    base, own = sorted(report["data"], key=lambda line: line["model"] == "m")
    assert (base["model"], base["requests"]) == ("tiny", 1)
    assert own["resident_s"] >= 0
    assert own == {
        "resident_s": own["resident_s"],
        "tenant": guest.name,
        "model": "m",
        "day": time.strftime("%Y-%m-%d", time.gmtime()),
        "requests": 4,
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in spent),
        "completion_tokens": sum(usage["completion_tokens"] for usage in spent),
        "cached_tokens": sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in spent),
    }
    assert guest.town.admin("GET", f"usage?tenant={guest.name}&since=9999-01-01")["data"] == []
    told = guest.town.admin("GET", f"usage?tenant={guest.name}")["data"]
    assert [{**line, "resident_s": 0} for line in told] == [{**line, "resident_s": 0} for line in report["data"]]
    guest.town["acme"].post("/v1/completions", json=BODY).raise_for_status()
    assert {line["tenant"] for line in guest.town.admin("GET", "usage")["data"]} >= {guest.name, "acme"}
    assert {line["tenant"] for line in guest.http.get("/v1/usage").json()["data"]} == {guest.name}
    assert guest.http.get("/v1/usage?since=9999-01-01").json()["data"] == []
    assert guest.http.get("/v1/usage?until=2026-01-01").json()["data"] == []
    for day in ("yesterday", "2026-13-45", "20260101", "1700000000"):
        assert day in error_of(guest.http.get(f"/v1/usage?since={day}"), 400, "invalid_request")["message"]
    counted = guest.town.server.metric("deltaserve:tenant_generation_tokens_total", tenant=guest.name, model="m")
    assert counted >= own["completion_tokens"]


def test_each_model_of_a_mixture_is_a_sequence_and_on_the_bill(
    guest: Guest, tenants: dict[str, Any], error_of: ErrorOf
) -> None:
    guest.put("m", tenants["sign"].artifact)
    guest.put("other", tenants["lowrank"].artifact)
    mixed: Any = {"model": "m", "mixture": [{"model": name, "weight": 1} for name in ("m", "other", "tiny")]}
    usage = guest.ask(**mixed).json()["usage"]
    lines = {line["model"]: line for line in guest.http.get("/v1/usage").json()["data"]}
    assert {model: line["requests"] for model, line in lines.items()} == {"m": 1, "other": 0, "tiny": 0}
    for line in lines.values():
        assert [line[what] for what in ("prompt_tokens", "completion_tokens")] == [
            usage["prompt_tokens"],
            usage["completion_tokens"],
        ]
    guest.limit(max_concurrent=2)
    assert "3 sequences" in error_of(guest.ask(**mixed), 400, "invalid_request")["message"]


def test_seconds_on_the_device_are_billed_to_who_asked(guest: Guest, tenants: dict[str, Any], process: Any) -> None:
    guest.put("m", tenants["sparse"].artifact)  # globex has the same file
    guest.put("idle", tenants["chatty"].artifact)
    assert guest.ask(model="m").is_success

    def resident() -> dict[str, float]:
        return {line["model"]: line["resident_s"] for line in guest.http.get("/v1/usage").json()["data"]}

    assert process.wait_until(lambda: resident()["m"], "the next reading") < 60
    assert "idle" not in resident()
    assert guest.town.server.metric("deltaserve:tenant_resident_seconds_total", tenant=guest.name, model="m") > 0


@pytest.mark.parametrize("limits", [{"requests_per_minute": 0}, {"max_bytes": -1}, {"max_tokens": 1.5}, {"max": 1}])
def test_a_limit_that_makes_no_sense_is_refused(town: Any, limits: dict[str, Any]) -> None:
    assert town.server.http.patch("/v1/admin/tenants/acme", json={"limits": limits}).status_code == 400


def test_the_command_line_sets_limits_and_shows_usage(
    guest: Guest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaserve.cli import main

    monkeypatch.setenv("DELTASERVE_URL", guest.town.server.url)
    monkeypatch.setenv("DELTASERVE_API_KEY", guest.town.server.api_key)
    guest.ask()
    assert main(["tenant", "limit", guest.name, "--requests-per-minute", "9", "--max-models", "2"]) == 0
    assert main(["tenant", "limit", guest.name, "--max-models", "none"]) == 0
    assert main(["usage", guest.name]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [f"{guest.name}: requests_per_minute=9 max_models=2", f"{guest.name}: requests_per_minute=9"]
    assert out[-1].split()[1:4] == [guest.name, "tiny", "1"]
