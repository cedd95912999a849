"""What one tenant can see of another without asking for anything of it: the time of an answer, logs, metrics."""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import httpx

PAIRS = 60
PROMPT_TOKENS = 480
DOUBT = 4 * ((2 * PAIRS + 1) / (12 * PAIRS**2)) ** 0.5  # four standard deviations of who guesses, around 0.5
KEY = "observer-admin"
CANARY = "canary-7c1e"


def auc(quick: Sequence[float], slow: Sequence[float]) -> float:
    """Chance that one of `slow` took longer than one of `quick`: 0.5 for who cannot tell them apart."""
    won = sum((s > q) + 0.5 * (s == q) for s in slow for q in quick)
    return won / (len(quick) * len(slow))


def seconds(client: httpx.Client, prompt: list[int]) -> float:
    began = time.perf_counter()
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    client.post("/v1/completions", json=body).raise_for_status()
    return time.perf_counter() - began


def test_the_time_of_an_answer_does_not_tell_what_another_tenant_has_asked(town: Any) -> None:
    """Threat: the first token comes sooner where the prefix cache has the prompt (vLLM CVE-2025-46570). The attacker
    asks what a victim has just asked, what it asked itself, and what nobody did, in random order, and compares. That it
    can tell its own from new ones shows that it would notice."""
    victim, attacker, rng = town["globex"], town["acme"], random.Random(0)
    times: dict[str, list[float]] = {"victim's": [], "new": [], "own": []}
    for _ in range(PAIRS):
        prompts = {kind: [rng.randrange(5, 250) for _ in range(PROMPT_TOKENS)] for kind in times}
        seconds(victim, prompts["victim's"])
        seconds(attacker, prompts["own"])
        for kind in rng.sample(list(times), len(times)):
            times[kind].append(seconds(attacker, prompts[kind]))
    told = {kind: auc(times[kind], times["new"]) for kind in ("victim's", "own")}
    medians = {kind: round(1000 * statistics.median(own), 2) for kind, own in times.items()}
    assert told["own"] - 0.5 > DOUBT, (told, medians)
    assert abs(told["victim's"] - 0.5) < DOUBT, (told, medians)


def test_prompts_and_keys_are_in_no_log_and_no_metric(
    start_server: Callable[..., Any], tenants: dict[str, Any], tmp_path: Any
) -> None:
    """Threat: what a tenant says is read by whoever reads logs and metrics; at the most talkative level, in requests
    that succeed and in all kinds that fail."""
    server = start_server("--log-level", "debug", "--import-root", str(tmp_path), api_key=KEY)
    server.upload("m", tenants["chatty"].artifact).raise_for_status()
    http, chat = server.http, {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 1}
    asked: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/completions", {"model": "m", "prompt": CANARY, "max_tokens": 2, "logprobs": 2, "echo": True}, 200),
        ("/v1/completions", {"model": "m", "prompt": [CANARY, 1]}, 400),
        ("/v1/completions", {"model": CANARY, "prompt": "x"}, 404),
        ("/v1/completions", {"model": "m", "prompt": CANARY * 500}, 400),
        ("/v1/completions", {"model": "m", "prompt": "x", CANARY: 1}, 400),
        ("/v1/completions", {"model": "m", "prompt": "x", "stop": [CANARY], "user": CANARY, "max_tokens": 1}, 200),
        ("/v1/completions", {"model": "m", "prompt": "x", "structured_outputs": {"regex": f"({CANARY}"}}, 400),
        ("/v1/completions", {"model": "m", "prompt": "x", "structured_outputs": {"choice": [CANARY]}}, 200),
        ("/v1/chat/completions", {"model": "m", **chat}, 200),
        ("/v1/chat/completions", {"model": "m", **chat, "stream": True}, 200),
        ("/v1/chat/completions", {"model": "m", **chat, "tools": [{"type": CANARY}]}, 400),
        ("/v1/load_lora_adapter", {"lora_name": "l", "lora_path": f"../{CANARY}"}, 404),
        ("/v1/uploads", {"bytes": 1, "filename": f"{CANARY}.bin", "mime_type": CANARY, "purpose": "fine-tune"}, 400),
    ]
    for path, body, status in asked:
        reply = http.post(path, json=body, headers={"x-request-id": CANARY})
        assert reply.status_code == status, (path, body, reply.text)
    assert http.post("/v1/completions", content=f"{{{CANARY}").status_code == 400
    assert http.put("/v1/deltas/m", content=CANARY * 9).status_code == 422
    assert http.get(f"/v1/{CANARY}?q={CANARY}").status_code == 404
    assert http.get("/v1/models", headers={"Authorization": f"Bearer {CANARY}"}).status_code == 401
    assert CANARY not in http.get("/metrics").text
    assert server.stop() == 0
    lines = [line for line in server.printed.splitlines() if CANARY in line or KEY in line]
    assert not lines, lines


def test_metrics_are_for_those_alone_that_may_see_all(town: Any) -> None:
    """Threat: names of tenants and models, and how much they are used, by the one route that tells of all."""
    for who in ("acme", "globex"):
        assert town[who].get("/metrics").status_code == 403
    assert "globex" in town.client("acme", "metrics").get("/metrics").text, "as an operator may"
    for path in ("/v1/usage", "/v1/models", "/v1/deltas", "/version", "/openapi.json"):
        reply = town["acme"].get(path)
        assert reply.is_success and "globex" not in reply.text, path
