"""Requests in which everything is as large as it may be, or larger. Answered or refused soon, in little memory, and
others are answered meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTLY_S = 90.0  # on a busy machine; a second or two on an idle one
MOST_MB = 400
MANY = {"prompt": ["Many fine-tunes"] * 128, "n": 128}  # 16384 sequences
WIDE = {
    "logit_bias": {str(token): 100 for token in range(290)},
    "stop": [chr(65 + i) * 1024 for i in range(16)],
    "stop_token_ids": list(range(128)),
    "logprobs": 20,
    "echo": True,
    "n": 16,
    "min_p": 1,
    "top_k": 2**31 - 1,
    "top_p": 5e-324,
    "temperature": 5e-324,
    "repetition_penalty": 10,
    "presence_penalty": -2,
    "frequency_penalty": 2,
    "seed": -(2**63),
    "user": "u" * 512,
    "max_tokens": 8,
    "min_tokens": 8,
}
DEEP: Any = "x"
for _ in range(200):
    DEEP = {"allOf": [DEEP]} if DEEP != "x" else {"type": "string"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
COMPLETIONS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "as many sequences as can be written": (MANY, {429}),
    "every parameter at its end": (WIDE, {200}),
    "a prompt of a million tokens": ({"prompt": [5] * 1_000_000}, {400}),
    "a prompt of 20 MB": ({"prompt": "a" * 20_000_000}, {400}),
    "a million prompts": ({"prompt": ["a"] * 1_000_000}, {400}),
    "a million prompts that are none": ({"prompt": [None] * 1_000_000}, {400}),
    "a million unknown fields": ({f"k{i}": 1 for i in range(10**6)}, {400}),
    "a million biases that are none": ({"logit_bias": {str(i): None for i in range(10**6)}}, {400}),
    "a million stops that are none": ({"stop": [1] * 10**6}, {400}),
    "a token id of 2 to the 40": ({"prompt": [2**40]}, {400}),
    "a number of 4000 digits": ({"max_tokens": int("9" * 4000)}, {400}),
    "an answer without end": ({"max_tokens": 2**31}, {400}),
    "log-probabilities of all": ({"logprobs": 10**6}, {400}),
    "a bias for a million tokens": ({"logit_bias": {str(i): 1 for i in range(10**6)}}, {400}),
    "a million stops": ({"stop": ["a"] * 10**6}, {400}),
    "a schema 200 deep": ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": DEEP}}},
                          {200, 400}),
    "a choice of 1024 long ones": ({"structured_outputs": {"choice": [f"{i}" * 1000 for i in range(1024)]}}, {400}),
    "a mixture of ninety": ({"mixture": [{"model": "tiny", "weight": 1}] * 90}, {400}),
}  # fmt: skip
CHATS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "a million messages": ({"messages": [{"role": "user", "content": "a"}] * 10**6}, {400}),
    "a million messages that are none": ({"messages": [1] * 10**6}, {400}),
    "a message of a million parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}] * 400_000}]},
        {400},
    ),
    "ten thousand tools": ({"tools": [TOOL] * 10_000, "messages": [{"role": "user", "content": "a"}]}, {400}),
}


def resident_mb(server: Any) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("name", [*COMPLETIONS, *CHATS])
def test_the_most_that_can_be_asked_is_answered_soon_and_cheaply(
    name: str, server: Any, at_once: Callable[..., list[Any]]
) -> None:
    """Threat: n, logprobs, stop, logit_bias and the like as amplifiers (VLLM_MAX_N_SEQUENCES, prompt_logprobs)."""
    path, (body, statuses) = (
        ("/v1/completions", COMPLETIONS[name]) if name in COMPLETIONS else ("/v1/chat/completions", CHATS[name])
    )
    whole = {"model": "tiny", "max_tokens": 1, **({"prompt": "Many"} if name in COMPLETIONS else {}), **body}
    before, began = resident_mb(server), time.monotonic()
    hostile, normal = at_once([
        lambda: server.http.post(path, json=whole),
        lambda: server.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}),
    ])  # fmt: skip
    assert time.monotonic() - began < PROMPTLY_S
    assert hostile.status_code in statuses, hostile.text[:500]
    assert len(hostile.content) < 2**20 and normal.status_code in (200, 429)
    assert resident_mb(server) - before < MOST_MB
