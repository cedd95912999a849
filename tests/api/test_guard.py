"""A key on every route but /health, a bounded queue, a bounded upload."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    ErrorOf = Callable[..., dict[str, Any]]

ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("DELETE", "/v1/models/x"),
    ("GET", "/v1/deltas"),
    ("GET", "/v1/deltas/x"),
    ("PUT", "/v1/deltas/x"),
    ("DELETE", "/v1/deltas/x"),
    ("GET", "/metrics"),
    ("GET", "/version"),
]
BODY = {"model": "tiny", "prompt": "Many", "messages": [{"role": "user", "content": "x"}]}
LONG = {"model": "tiny", "prompt": "Many", "max_tokens": 480, "extra_body": {"ignore_eos": True}}


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic c2VjcmV0", "secret-key-1", "Bearer Schlüssel"]
)
def test_no_route_answers_without_the_key(
    method: str, path: str, header: str | None, guarded: Any, error_of: ErrorOf
) -> None:
    headers = {"authorization": header.encode()} if header else {}
    body = {"json": BODY} if method == "POST" else {}
    with httpx.Client(base_url=guarded.url) as stranger:
        reply = stranger.request(method, path, headers=headers, **body)
        error = error_of(reply, 401, "invalid_api_key")
    assert error["type"] == "authentication_error"
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/redoc"])
def test_nothing_is_described_to_strangers(path: str, guarded: Any) -> None:
    with httpx.Client(base_url=guarded.url) as stranger:
        assert stranger.get(path).status_code in (401, 404)


def test_health_is_open_to_all(guarded: Any) -> None:
    with httpx.Client(base_url=guarded.url) as stranger:
        reply = stranger.get("/health")
    assert (reply.status_code, reply.content) == (200, b"")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_right_key_passes(method: str, path: str, guarded: Any) -> None:
    body = {"json": BODY} if method == "POST" else {}
    assert guarded.http.request(method, path, **body).status_code != 401


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_an_upload_over_the_bound_is_refused(declared: bool, guarded: Any, error_of: ErrorOf) -> None:
    pieces = [b"x" * 60_000] * 2
    reply = guarded.http.put("/v1/deltas/big", content=b"".join(pieces) if declared else iter(pieces))
    assert "100000" in error_of(reply, 413, "artifact_too_large")["message"]


def test_a_full_queue_is_a_429_that_says_when_to_retry(guarded: Any, process: Any, error_of: ErrorOf) -> None:
    with guarded.client() as client:
        running = client.completions.create(stream=True, **LONG)
        next(iter(running))
        waiting = httpx.Client(base_url=guarded.url, headers=guarded.http.headers, timeout=60)
        with waiting, Thread(lambda: waiting.post("/v1/completions", json=BODY_SHORT)) as second:
            process.wait_until(lambda: guarded.metric("vllm:num_requests_waiting") == 1, "one request waits")

            reply = guarded.http.post("/v1/completions", json=BODY_SHORT)
            error = error_of(reply, 429, "queue_full")
            assert int(reply.headers["retry-after"]) >= 1
            assert error["type"] == "rate_limit_error"
            assert guarded.metric("vllm:admission_rejections_total") >= 1
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model="tiny", prompt="a", max_tokens=1)

            running.close()
            assert second.result(60).status_code == 200, "the one that waited gets its turn"
    guarded.wait_idle()


BODY_SHORT = {"model": "tiny", "prompt": "Many", "max_tokens": 1}


class Thread:
    """One call on a thread, as a context."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._call = call

    def __enter__(self) -> Any:
        return self._pool.submit(self._call)

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True)
