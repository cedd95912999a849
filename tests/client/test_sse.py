"""Event framing, however the bytes are cut."""

from __future__ import annotations

import pytest

from deltaserve_client.sse import SseDecoder


def decode(*chunks: bytes) -> list[bytes]:
    decoder = SseDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


BODY = ': hello\n\ndata: {"a": "ä€😀"}\n\nevent: x\nid: 1\ndata: one\ndata:two\n\ndata:  [DONE]\n\n'.encode()
EVENTS = ['{"a": "ä€😀"}'.encode(), b"one\ntwo", b" [DONE]"]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_cut_at_any_byte_changes_nothing(line_end):
    body = BODY.replace(b"\n", line_end)
    for cut in range(len(body) + 1):
        assert decode(body[:cut], b"", body[cut:]) == EVENTS, cut
    assert decode(*(bytes([byte]) for byte in body)) == EVENTS


def test_an_event_is_given_as_soon_as_its_empty_line_is_there():
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\r\n\r") == [b"a"]
    assert decoder.feed(b"\ndata: b\r\n\r\n") == [b"b"]


@pytest.mark.parametrize("body", [b"data: a", b"data: a\n", b": ping\n\n", b"\n\n\n", b"datax: a\n\n"])
def test_what_is_not_a_finished_data_event_gives_nothing(body):
    assert decode(body) == []


def test_line_ends_are_only_those_of_the_format():
    assert decode("data: a\u2028b\x0bc\x85\n\n".encode()) == ["a\u2028b\x0bc\x85".encode()]


def test_data_without_a_value_is_an_empty_payload():
    assert decode(b"data\n\ndata:\n\n") == [b"", b""]
