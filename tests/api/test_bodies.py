"""Bodies that are no request, and paths that do not exist: an answer in OpenAI's shape, and the server lives on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

    ErrorOf = Callable[..., dict[str, Any]]

PATHS = ["/v1/completions", "/v1/chat/completions"]
JSON = {"content-type": "application/json"}
VALID = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"null",
        b"[1]",
        b'"a"',
        b"7",
        b"\xff\xfe\x00",
        VALID + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "seed": 1' + b"0" * 5000 + b"}",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_a_body_that_is_no_json_object_says_so(path: str, raw: bytes, http: httpx.Client, error_of: ErrorOf) -> None:
    assert "JSON" in error_of(http.post(path, content=raw, headers=JSON), 400, "invalid_json")["message"]


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
def test_a_wrong_content_type_is_named(kind: str, http: httpx.Client, error_of: ErrorOf) -> None:
    reply = http.post(PATHS[0], content=VALID, headers={"content-type": kind})
    assert kind in error_of(reply, 400, "invalid_json")["message"]


def test_nul_is_a_character_like_any_other(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "a\x00b", "max_tokens": 2, "stop": "\x00"}
    assert http.post(PATHS[0], json=body).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        rb'{"model": "tiny", "prompt": "a\ud800"}',
        rb'{"model": "tiny", "prompt": ["a\udfff"]}',
        rb'{"model": "\ud800", "prompt": "a"}',
        rb'{"model": "tiny", "prompt": "a", "stop": "\ud800"}',
        rb'{"model": "tiny", "prompt": "a", "logit_bias": {"\ud800": 1}}',
        rb'{"model": "tiny", "prompt": "a", "user": "\ud800"}',
    ],
)
def test_a_lone_surrogate_is_refused(raw: bytes, http: httpx.Client, error_of: ErrorOf) -> None:
    error_of(http.post(PATHS[0], content=raw, headers=JSON), 400, "invalid_request")


@pytest.mark.parametrize("place", ['"content": "\\ud800"', '"content": "x", "name": "\\ud800"'])
def test_a_lone_surrogate_in_a_message_is_refused(place: str, http: httpx.Client, error_of: ErrorOf) -> None:
    raw = f'{{"model": "tiny", "messages": [{{"role": "user", {place}}}]}}'
    error_of(http.post(PATHS[1], content=raw, headers=JSON), 400, "invalid_request")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_refused(chunked: bool, http: httpx.Client, error_of: ErrorOf) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(33):
            yield b" " * 2**20

    content = pieces() if chunked else b" " * (33 * 2**20)
    error = error_of(http.post(PATHS[0], content=content, headers=JSON), 400, "invalid_request")
    assert str(32 * 2**20) in error["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/v1"), ("POST", "/v1/embeddings"), ("GET", "/v1/completions/x")]
)
def test_a_path_that_does_not_exist_is_a_404(method: str, path: str, http: httpx.Client, error_of: ErrorOf) -> None:
    assert f"{method} {path}" in error_of(http.request(method, path), 404, "not_found")["message"]


def test_a_parameter_of_the_query_that_nobody_reads_is_refused(http: httpx.Client, error_of: ErrorOf) -> None:
    error = error_of(http.put("/v1/deltas/m?sha265=" + 64 * "0", content=b"x"), 400, "unsupported_parameter")
    assert error["param"] == "sha265" and "activate, sha256" in error["message"]
    error_of(http.get("/v1/models?tenant=acme"), 400, "unsupported_parameter")
    error_of(http.post("/v1/completions?stream=true", json={}), 400, "unsupported_parameter")
    assert http.get("/v1/models?limit=1").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("POST", "/v1/deltas", "GET"),
        ("POST", "/health", "GET"),
        ("BREW", "/v1/models", "GET"),
        ("POST", "/v1/deltas/m", "GET, PUT, PATCH, DELETE"),
        ("PUT", "/v1/models/m", "GET, DELETE"),
    ],
)
def test_a_method_that_a_path_does_not_take_is_a_405(
    method: str, path: str, allowed: str, http: httpx.Client, error_of: ErrorOf
) -> None:
    reply = http.request(method, path)
    error_of(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == allowed


def test_the_callers_request_id_comes_back(http: httpx.Client) -> None:
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [http.get("/health").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    assert http.get("/health", headers={"x-request-id": "x" * 129}).headers["x-request-id"] != "x" * 129
