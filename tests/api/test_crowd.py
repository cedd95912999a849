"""Many requests of one tenant at the same moment: all are answered, none is refused while the queue has room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_REQUESTS = 120


def test_a_burst_for_one_chat_template_is_answered(server: Any, at_once: Callable[..., list[Any]]) -> None:
    body = {"model": "chatty", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
    replies = at_once([lambda: server.http.post("/v1/chat/completions", json=body) for _ in range(NUM_REQUESTS)])
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1
