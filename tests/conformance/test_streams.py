"""Streams: the same answer as the whole reply, in chunks of the shape that clients rely on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Ask = Callable[..., Any]

MESSAGES = [{"role": "user", "content": "What is a delta? 你好"}]
SETTINGS: dict[str, Any] = {"temperature": 1, "seed": 3, "n": 2, "max_tokens": 24}


@pytest.mark.parametrize("name", ["tiny", "sign", "chatty"])
def test_a_streamed_completion_is_the_whole_one(name: str, complete: Ask) -> None:
    whole = complete(name, logprobs=2, **SETTINGS)
    texts, tokens = ["", ""], [[], []]
    for chunk in complete(name, logprobs=2, **SETTINGS, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]


@pytest.mark.parametrize("name", ["tiny", "sign", "chatty"])
def test_a_streamed_chat_is_the_whole_one(name: str, client: Any) -> None:
    whole = client.chat.completions.create(model=name, messages=MESSAGES, **SETTINGS)
    chunks = list(
        client.chat.completions.create(
            model=name, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **SETTINGS
        )
    )
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunks[-1].usage.model_copy(update={"prompt_tokens_details": None}) == whole.usage.model_copy(
        update={"prompt_tokens_details": None}
    )


def test_an_answer_of_the_client_library_can_be_sent_back(client: Any) -> None:
    first = client.chat.completions.create(model="sign", messages=MESSAGES, max_tokens=4, temperature=0)
    conversation = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "and then?"}]
    second = client.chat.completions.create(model="sign", messages=conversation, max_tokens=4, temperature=0)
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_chat_chunks_keep_their_order(client: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model="sign", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **SETTINGS
        )
    )

    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.model, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert own[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in own[1:])
        assert [choice.finish_reason for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason in ("stop", "length")


def test_completion_chunks_keep_their_order(complete: Ask) -> None:
    chunks = list(complete(**SETTINGS, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    for index in range(2):
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [reason for reason in reasons if reason] == reasons[-1:]


def test_there_is_no_usage_chunk_unless_it_is_asked_for(complete: Ask) -> None:
    assert all(chunk.choices and chunk.usage is None for chunk in complete(max_tokens=4, stream=True))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_server_sent_events_that_end_with_done(path: str, server: Any) -> None:
    asked = {"messages": MESSAGES} if "chat" in path else {"prompt": "Many"}
    body = {"model": "tiny", "max_tokens": 4, "ignore_eos": True, "stream": True, **asked}
    reply = server.http.post(path, json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = reply.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["id"] for event in events)


def test_a_stream_that_cannot_begin_is_an_http_error(complete: Ask) -> None:
    with pytest.raises(Exception, match="does not exist") as raised:
        complete("nobody", stream=True)
    assert raised.value.status_code == 404
