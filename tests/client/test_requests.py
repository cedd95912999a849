"""What is sent for each method, and the values that come back."""

from __future__ import annotations

import json

import httpx
import pytest

from deltaserve_client import Client, InvalidArgument, UnexpectedReply


def test_deltas_are_listed(wire, delta_json):
    (delta,) = wire.ask(httpx.Response(200, json={"object": "list", "data": [delta_json]}), "deltas")
    assert (delta.id, delta.version, delta.codec, delta.state) == ("numwords", 3, "bitdelta", "device")
    assert delta.bits_per_parameter == 1.0 and isinstance(delta.bits_per_parameter, float)
    assert delta.raw == delta_json, "fields this client does not know stay readable"
    assert wire.requests[0].url.path == "/v1/deltas"


def test_one_delta(wire, delta_json):
    assert wire.ask(httpx.Response(200, json=delta_json), "delta", "numwords").sha256 == "ab" * 32
    assert str(wire.requests[0].url) == "http://127.0.0.1:8000/v1/deltas/numwords"


def test_delete(wire):
    assert wire.ask(httpx.Response(200, json={"id": "a", "object": "delta", "deleted": True}), "delete", "a") is None
    assert (wire.requests[0].method, wire.requests[0].url.path) == ("DELETE", "/v1/deltas/a")


def test_models_are_listed_and_a_base_has_no_parent(wire, model_json):
    data = [model_json, {**model_json, "id": "tiny", "parent": None}]
    models = wire.ask(httpx.Response(200, json={"object": "list", "data": data}), "models")
    assert [(model.id, model.parent) for model in models] == [("numwords", "tiny"), ("tiny", None)]


def test_complete_sends_the_options_and_reads_the_text(wire, completion_json):
    reply = wire.ask(httpx.Response(200, json=completion_json), "complete", "numwords", "12 =", max_tokens=2, seed=None)
    assert (reply.text, reply.finish_reason) == (" twelve", "length")
    assert (reply.prompt_tokens, reply.completion_tokens) == (4, 2)
    body = json.loads(wire.requests[0].content)
    assert body == {"model": "numwords", "prompt": "12 =", "max_tokens": 2, "seed": None}
    assert wire.requests[0].headers["content-type"] == "application/json"


def test_chat_reads_the_message(wire, completion_json):
    message = {"role": "assistant", "content": "Zwölf"}
    completion_json["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
    messages = [{"role": "user", "content": "12?"}]
    assert wire.ask(httpx.Response(200, json=completion_json), "chat", "numwords", messages).text == "Zwölf"
    assert json.loads(wire.requests[0].content)["messages"] == messages


def test_version(wire):
    version = wire.ask(httpx.Response(200, json={"version": "0.1.0", "torch": "2.11"}), "version")
    assert (version.version, version.raw["torch"]) == ("0.1.0", "2.11")


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_health_is_the_state_now(wire, status, is_healthy):
    assert wire.ask(httpx.Response(status, headers={"retry-after": "5"}), "health") is is_healthy
    assert len(wire.requests) == 1, "a draining server is an answer, not a reason to wait"


@pytest.mark.parametrize(
    ("name", "raw_path"),
    [
        ("a/b", b"/v1/deltas/a%2Fb"),
        ("a b?c#d", b"/v1/deltas/a%20b%3Fc%23d"),
        ("50%25", b"/v1/deltas/50%2525"),
        ("größe", b"/v1/deltas/gr%C3%B6%C3%9Fe"),
        ("..", b"/v1/deltas/%2E%2E"),
        ("../models", b"/v1/deltas/..%2Fmodels"),
        ("v1.2", b"/v1/deltas/v1.2"),
    ],
)
def test_a_name_is_one_path_segment_whatever_it_holds(wire, name, raw_path):
    wire.ask(httpx.Response(200, json={}), "delete", name)
    assert wire.requests[0].url.raw_path == raw_path


def test_a_base_url_keeps_its_own_path(wire):
    wire.settings["base_url"] = "https://example.test/team/"
    wire.ask(httpx.Response(200, json={"data": []}), "deltas")
    assert str(wire.requests[0].url) == "https://example.test/team/v1/deltas"


def test_the_key_is_sent_and_the_argument_wins_over_the_environment(wire, monkeypatch):
    empty = httpx.Response(200, json={"data": []})
    wire.ask(empty, "deltas")
    monkeypatch.setenv("DELTASERVE_API_KEY", "from-environment")
    wire.ask(empty, "deltas")
    wire.settings["api_key"] = "from-argument"
    wire.ask(empty, "deltas")
    sent = [request.headers.get("authorization") for request in wire.requests]
    assert sent == [None, "Bearer from-environment", "Bearer from-argument"]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://h:x", ""])
def test_a_url_that_cannot_work_is_refused_at_once(url):
    with pytest.raises(InvalidArgument, match="base_url"):
        Client(url)


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it():
    with pytest.raises(InvalidArgument) as caught:
        Client(api_key="secret\n")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "args", "options"),
    [
        ("delta", [""], {}),
        ("delta", ["\udcff"], {}),
        ("complete", ["m", "p"], {"stream": True}),
        ("complete", ["m", "p"], {"temperature": float("nan")}),
        ("complete", ["m", "\udcff"], {}),
        ("chat", ["m", [object()]], {}),
    ],
)
def test_what_cannot_be_sent_is_refused_before_sending(wire, method, args, options):
    with pytest.raises(InvalidArgument):
        wire.ask(httpx.Response(200, json={}), method, *args, **options)
    assert wire.requests == []


@pytest.mark.parametrize(
    ("method", "args", "content"),
    [
        ("deltas", [], b"<html>"),
        ("deltas", [], b"[]"),
        ("deltas", [], b'{"data": [1]}'),
        ("delta", ["a"], b'{"id": "a"}'),
        ("version", [], b'{"version": 1}'),
        ("complete", ["m", "p"], b'{"id": "a", "model": "m", "choices": [], "usage": {}}'),
        ("version", [], b'{"version": "\xff"}'),
    ],
)
def test_a_reply_off_the_contract_is_named_so(wire, method, args, content):
    with pytest.raises(UnexpectedReply):
        wire.ask(httpx.Response(200, content=content), method, *args)


def test_any_route_can_be_asked(wire):
    data = {"object": "list", "data": []}
    assert (
        wire.ask(httpx.Response(200, json=data), "request", "GET", "/v1/admin/keys", params={"tenant": "a b"}) == data
    )
    assert str(wire.requests[0].url) == "http://127.0.0.1:8000/v1/admin/keys?tenant=a+b"
    wire.ask(httpx.Response(201, json={}), "request", "POST", "/v1/admin/tenants", {"name": "a"})
    assert json.loads(wire.requests[1].content) == {"name": "a"}


@pytest.mark.parametrize(
    ("path", "params", "sent"),
    [
        ("/v1/admin/keys?tenant=a%2Fb", None, "tenant=a%2Fb"),
        ("/v1/admin/keys?tenant=a&limit=2", {"limit": "3"}, "tenant=a&limit=3"),
        ("/v1/admin/keys?tenant=", None, "tenant="),
        ("/v1/admin/keys", {"tenant": "a"}, "tenant=a"),
        ("/v1/admin/keys", None, ""),
    ],
)
def test_a_query_in_the_path_is_sent(wire, path, params, sent):
    assert wire.ask(httpx.Response(200, json={"data": []}), "request", "GET", path, params=params) == {"data": []}
    assert (wire.requests[0].url.path, wire.requests[0].url.query.decode()) == ("/v1/admin/keys", sent)
