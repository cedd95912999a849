"""Text streams: whole, failed half-way, cut short."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, closing

import httpx
import pytest

from deltaserve_client import AsyncClient, Client, StreamFailed, StreamTruncated, UnexpectedReply

DONE = b"data: [DONE]\n\n"


def event(value):
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def text(piece, index=0):
    return event({"choices": [{"index": index, "text": piece, "finish_reason": None}]})


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Gives its chunks, then raises `failure` if there is one."""

    def __init__(self, *chunks, failure=None):
        self.chunks, self.failure, self.num_read = chunks, failure, 0

    def __iter__(self):
        for chunk in self.chunks:
            self.num_read += 1
            yield chunk
        if self.failure:
            raise self.failure

    async def __aiter__(self):
        for chunk in self:
            yield chunk


def stream_of(*chunks, failure=None):
    headers = {"content-type": "text/event-stream", "x-request-id": "r-9"}
    return httpx.Response(200, headers=headers, stream=Body(*chunks, failure=failure))


def test_pieces_of_a_completion(wire):
    usage = event({"choices": [], "usage": {"completion_tokens": 2}})
    response = stream_of(text("zwö"), text(""), text("lf"), usage, DONE)
    assert wire.ask(response, "stream", "m", "12 =", max_tokens=2) == ["zwö", "lf"]
    body = json.loads(wire.requests[0].content)
    assert body == {"model": "m", "prompt": "12 =", "stream": True, "max_tokens": 2}
    assert response.is_closed


def test_pieces_of_a_chat(wire):
    deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {"content": None}, {}]
    chunks = [event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    assert wire.ask(stream_of(*chunks, DONE), "stream_chat", "m", [{"role": "user", "content": "x"}]) == ["a", "b"]
    assert wire.requests[0].url.path == "/v1/chat/completions"


def test_every_byte_a_chunk_of_its_own(wire):
    body = text("zwölf €") + DONE
    assert wire.ask(stream_of(*(bytes([byte]) for byte in body)), "stream", "m", "p") == ["zwölf €"]


ERROR = event({"error": {"message": "NaN", "type": "server_error", "param": None, "code": "numerical_error"}})


@pytest.mark.parametrize("chunks", [[text("a"), ERROR, DONE], [text("a") + ERROR + DONE]])
def test_an_error_inside_a_stream_is_raised_after_the_text_before_it(chunks):
    pieces = []
    client = Client(transport=httpx.MockTransport(lambda _: stream_of(*chunks)))
    with client, pytest.raises(StreamFailed) as caught:
        for piece in client.stream("m", "p"):
            pieces.append(piece)
    assert pieces == ["a"]
    assert (caught.value.code, caught.value.message, caught.value.request_id) == ("numerical_error", "NaN", "r-9")


def test_an_error_inside_a_stream_closes_it_and_is_not_repeated(wire):
    response = stream_of(text("a"), ERROR)
    with pytest.raises(StreamFailed):
        wire.ask(response, "stream", "m", "p")
    assert response.is_closed
    assert len(wire.requests) == 1


@pytest.mark.parametrize(
    "response",
    [
        lambda: stream_of(text("a")),
        lambda: stream_of(text("a"), b"data: [DONE]\n"),
        lambda: stream_of(text("a"), failure=httpx.RemoteProtocolError("peer closed connection")),
        lambda: stream_of(text("a"), failure=httpx.ReadTimeout("")),
        lambda: httpx.Response(200, json={"choices": []}),
        lambda: httpx.Response(200),
    ],
)
def test_a_stream_that_ends_without_done_is_truncated_and_not_repeated(wire, response):
    with pytest.raises(StreamTruncated, match=r"without \[DONE\]"):
        wire.ask(response(), "stream", "m", "p")
    assert len(wire.requests) == 1


def test_a_connection_lost_after_done_loses_nothing(wire):
    response = stream_of(text("a"), DONE, text("ignored"), failure=httpx.ReadError("reset"))
    assert wire.ask(response, "stream", "m", "p") == ["a"]


@pytest.mark.parametrize(
    "body", [b"data: {\n\n", b"data: 1\n\n", b"data: {}\n\n", text("a", index=1), b"data: \xff\n\n"]
)
def test_an_event_off_the_contract_is_named_so(wire, body):
    with pytest.raises(UnexpectedReply):
        wire.ask(stream_of(body, DONE), "stream", "m", "p")


def test_pieces_come_as_they_are_made_and_leaving_early_closes_the_stream():
    body = Body(text("a"), text("b"), DONE)
    response = httpx.Response(200, stream=body)
    with Client(transport=httpx.MockTransport(lambda _: response)) as client:
        with closing(client.stream("m", "p")) as pieces:
            assert next(pieces) == "a"
            assert body.num_read == 1
        assert response.is_closed


def test_leaving_early_closes_the_async_stream():
    response = stream_of(text("a"), text("b"), DONE)

    async def first():
        async with AsyncClient(transport=httpx.MockTransport(lambda _: response)) as client:
            async with aclosing(client.stream("m", "p")) as pieces:
                assert await anext(pieces) == "a"
            assert response.is_closed

    asyncio.run(first())
