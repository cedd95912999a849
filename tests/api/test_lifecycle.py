"""Clients that leave, a server that is stopped, killed, and started again."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = {"model": "sign", "prompt": "Many", "max_tokens": 480, "ignore_eos": True, "n": 4, "temperature": 0}
STREAMED = {
    "model": "sign",
    "prompt": "Many",
    "temperature": 0,
    "max_tokens": 400,
    "extra_body": {"ignore_eos": True},
}


def test_a_client_that_leaves_its_stream_frees_the_engine(server: Any) -> None:
    before = server.metric("vllm:request_success_total", finished_reason="cancelled")
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
        lines = reply.iter_lines()  # kept: the reply is closed with it
        next(lines)
        assert server.metric("vllm:num_requests_running") == 4
    server.wait_idle()
    assert server.metric("vllm:request_success_total", finished_reason="cancelled") == before + 4
    assert server.metric("vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_does_not_wait_for_its_answer_frees_the_engine(path: str, server: Any, process: Any) -> None:
    before = server.metric("vllm:request_success_total", finished_reason="cancelled")
    body: dict[str, Any] = dict(LONG)
    if "chat" in path:
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": "Hello"}]
    left = threading.Event()

    def ask_and_leave() -> None:
        with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
            client.post(path, json=body, timeout=httpx.Timeout(60, read=0.5))
        left.set()

    leaver = threading.Thread(target=ask_and_leave)
    leaver.start()
    process.wait_until(lambda: server.metric("vllm:num_requests_running") == 4, "the request runs")
    leaver.join()
    assert left.is_set()
    server.wait_idle()
    assert server.metric("vllm:request_success_total", finished_reason="cancelled") == before + 4


def test_deltas_survive_a_drain_and_a_kill_and_running_requests_a_drain(
    start_server: Callable[..., Any], tenants: dict[str, Any], tmp_path: Any, process: Any
) -> None:
    """One store, three servers in turn: drained, killed in the middle of an upload, stopped without time to drain."""
    first = start_server()
    assert first.upload("sign", tenants["sign"].artifact).status_code == 201
    assert first.upload("sign", tenants["sparse"].artifact).json()["version"] == 2
    text = _drain_finishes_a_stream(first, process)

    second = start_server()
    card = second.http.get("/v1/deltas/sign").json()
    assert (card["version"], card["codec"], card["state"]) == (2, "dare", "disk")
    body = {"model": "sign", "prompt": "Many", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    assert text.startswith(second.http.post("/v1/completions", json=body).json()["choices"][0]["text"].rstrip("\ufffd"))
    incoming = tmp_path / "store" / "incoming"
    _kill_during_an_upload(second, tenants["lowrank"].artifact, incoming, process)

    third = start_server("--shutdown-timeout-s", "0")
    assert [card["id"] for card in third.http.get("/v1/deltas").json()["data"]] == ["sign"]
    assert list(incoming.iterdir()) == []
    _out_of_time_is_an_error_in_the_stream(third)


def _drain_finishes_a_stream(server: Any, process: Any) -> str:
    with server.client() as client:
        stream = client.completions.create(stream=True, **STREAMED)
        chunks = [next(iter(stream))]
        server.signal_stop()
        process.wait_until(lambda: server.http.get("/health").status_code == 503, "/health says that it drains")
        refused = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.exit_status() == 0, server.printed
    assert "Traceback" not in server.printed
    return "".join(chunk.choices[0].text for chunk in chunks)


def _kill_during_an_upload(server: Any, artifact: bytes, incoming: Any, process: Any) -> None:
    def half() -> Iterator[bytes]:
        yield artifact[:5000]
        process.wait_until(lambda: list(incoming.iterdir()), "the upload has begun")
        server.process.kill()
        server.exit_status()
        yield artifact[5000:]

    with pytest.raises(httpx.TransportError):
        server.http.put("/v1/deltas/other", content=half())
    assert list(incoming.iterdir()), "what the killed server left"


def _out_of_time_is_an_error_in_the_stream(server: Any) -> None:
    with server.client() as client:
        stream = client.completions.create(stream=True, **STREAMED)
        next(iter(stream))
        server.signal_stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert server.exit_status() == 0, server.printed


def test_a_server_that_cannot_start_says_why(process: Any, tmp_path: Any) -> None:
    broken = process.ServerProcess(tmp_path / "base", tmp_path / "store", "--max-num-seqs", "0")
    with pytest.raises(AssertionError, match=r"ended with status 2:(.|\n)*max_num_seqs"):
        broken.wait_ready()
    broken.close()


def test_a_base_with_layers_that_keep_no_paged_state_does_not_start(
    process: Any, tmp_path: Any, tiny_base: Any
) -> None:
    from transformers import AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1, vocab_size=300
    )
    Mamba2ForCausalLM(config).save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "mamba")
    broken = process.ServerProcess(tmp_path / "mamba", tmp_path / "store")
    try:
        with pytest.raises(AssertionError, match=r"status 1:(.|\n)*error: this architecture cannot be served"):
            broken.wait_ready()
    finally:
        broken.close()


def test_a_second_signal_does_not_undo_the_first(start_server: Any) -> None:
    own = start_server()
    own.signal_stop()
    own.signal_stop()
    assert own.exit_status() == 0, own.printed
