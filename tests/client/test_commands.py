"""The command line over the client: what is printed where, and the exit status."""

from __future__ import annotations

import argparse
import functools
import json

import httpx
import pytest

from deltaserve.cli import connection, jobs, remote
from deltaserve_client import Client


class Terminal:
    """Runs a command line against a scripted server and keeps what it printed."""

    def __init__(self, monkeypatch, capsys):
        self.replies, self.requests = {}, []
        self._capsys = capsys
        transport = httpx.MockTransport(self._answer)
        monkeypatch.setattr(connection, "Client", functools.partial(Client, transport=transport, sleep=lambda _: None))

    def _answer(self, request):
        self.requests.append(request)
        return self.replies[request.method, request.url.path]

    def run(self, *words):
        parser = argparse.ArgumentParser()
        commands = parser.add_subparsers(required=True)
        remote.register(commands)
        jobs.register(commands)
        args = parser.parse_args([str(word) for word in words])
        self.status = args.run(args)
        self.out, self.err = self._capsys.readouterr()
        return self.status


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal(monkeypatch, capsys)


def sse(*texts, is_chat=False):
    choices = [{"delta": {"content": text}} if is_chat else {"text": text} for text in texts]
    events = [json.dumps({"choices": [choice]}) for choice in choices]
    return httpx.Response(200, text="".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]))


def test_push_names_the_delta_after_the_file_and_prints_what_to_do_next(terminal, tmp_path, delta_json):
    path = tmp_path / "numwords.delta"
    path.write_bytes(b"x" * 10)
    terminal.replies["PUT", "/v1/deltas/numwords"] = httpx.Response(201, json=delta_json)
    assert terminal.run("push", path) == 0
    assert terminal.out == (
        "numwords version 3: bitdelta, 1.00 bits per parameter, 1.5 MB\nnext: deltaserve complete numwords 'Hello'\n"
    )
    assert "10/10 bytes" in terminal.err


def test_push_takes_a_name_and_repeats_the_url_in_the_next_command(terminal, tmp_path, delta_json):
    path = tmp_path / "out.delta"
    path.write_bytes(b"x")
    terminal.replies["PUT", "/v1/deltas/mine"] = httpx.Response(201, json={**delta_json, "id": "mine"})
    assert terminal.run("push", path, "--name", "mine", "--url", "http://box:9") == 0
    assert terminal.out.endswith("next: deltaserve complete mine 'Hello' --url http://box:9\n")
    assert terminal.requests[0].url.host == "box"


def test_push_of_a_missing_file_says_which(terminal, tmp_path):
    assert terminal.run("push", tmp_path / "gone.delta") == 1
    assert f"error: {tmp_path}/gone.delta: No such file or directory\n" in terminal.err
    assert terminal.requests == []


@pytest.fixture
def listing(terminal, delta_json, model_json):
    data = [{**model_json, "id": "tiny", "parent": None}, model_json]
    terminal.replies["GET", "/v1/models"] = httpx.Response(200, json={"data": data})
    terminal.replies["GET", "/v1/deltas"] = httpx.Response(200, json={"data": [delta_json]})
    return terminal


def test_models_is_a_table(listing):
    assert listing.run("models") == 0
    assert [line.split() for line in listing.out.splitlines()] == [
        ["id", "version", "codec", "bits/param", "disk", "resident", "state"],
        ["tiny", "base"],
        ["numwords", "3", "bitdelta", "1.00", "1.5", "MB", "2.0", "MB", "device"],
    ]


def test_models_as_json_holds_the_servers_own_fields(listing, delta_json):
    assert listing.run("models", "--json") == 0
    base, numwords = json.loads(listing.out)
    assert (base["id"], base["delta"]) == ("tiny", None)
    assert (numwords["id"], numwords["delta"]) == ("numwords", delta_json)


def test_complete_streams(terminal):
    terminal.replies["POST", "/v1/completions"] = sse("twe", "lve")
    assert terminal.run("complete", "numwords", "12 =", "--max-tokens", 5, "--temperature", 0) == 0
    assert terminal.out == "twelve\n"
    body = json.loads(terminal.requests[0].content)
    assert body == {"model": "numwords", "prompt": "12 =", "stream": True, "max_tokens": 5, "temperature": 0.0}


def test_complete_as_chat(terminal):
    terminal.replies["POST", "/v1/chat/completions"] = sse("twe", "lve", is_chat=True)
    assert terminal.run("complete", "numwords", "12?", "--chat") == 0
    assert terminal.out == "twelve\n"
    assert json.loads(terminal.requests[0].content)["messages"] == [{"role": "user", "content": "12?"}]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_complete_without_a_stream(terminal, completion_json, route):
    chat = ["--chat"] if "chat" in route else []
    terminal.replies["POST", route] = httpx.Response(200, json=completion_json)
    assert terminal.run("complete", "numwords", "12 =", "--no-stream", *chat) == 0
    assert terminal.out == " twelve\n"
    assert terminal.run("complete", "numwords", "12 =", "--json", *chat) == 0
    assert json.loads(terminal.out) == completion_json


def test_an_answer_cut_short_is_an_error_on_a_line_of_its_own(terminal):
    event = 'data: {"choices": [{"text": "twe"}]}\n\n'
    terminal.replies["POST", "/v1/completions"] = httpx.Response(200, text=event)
    assert terminal.run("complete", "numwords", "12 =") == 1
    assert terminal.out == "twe\n"
    assert terminal.err.startswith("error: stream ended without [DONE]")


def test_delete(terminal):
    terminal.replies["DELETE", "/v1/deltas/numwords"] = httpx.Response(200, json={"deleted": True})
    assert terminal.run("delete", "numwords", "--api-key", "k") == 0
    assert terminal.out == "deleted numwords\n"
    assert terminal.requests[0].headers["authorization"] == "Bearer k"


def test_the_servers_refusal_is_one_line_and_status_one(terminal):
    error = {"message": "no delta 'x'", "type": "t", "param": None, "code": "not_found"}
    terminal.replies["DELETE", "/v1/deltas/x"] = httpx.Response(404, json={"error": error})
    assert terminal.run("delete", "x") == 1
    assert (terminal.out, terminal.err) == ("", "error: no delta 'x' (404 not_found)\n")


def test_the_url_comes_from_the_environment(terminal, monkeypatch, listing):
    monkeypatch.setenv("DELTASERVE_URL", "http://box:9")
    assert listing.run("models") == 0
    assert {request.url.host for request in terminal.requests} == {"box"}


def test_a_url_that_cannot_work_is_an_error_not_a_traceback(terminal):
    assert terminal.run("models", "--url", "localhost") == 1
    assert terminal.err.startswith("error: base_url 'localhost'")
