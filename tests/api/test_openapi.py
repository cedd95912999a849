"""The OpenAPI document says what the server does: an example of every body, every error with its code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltaserve import errors

if TYPE_CHECKING:
    import httpx


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def codes(operation: dict[str, Any]) -> set[str]:
    return {
        code
        for status, reply in operation["responses"].items()
        if status >= "400" and "content" in reply
        for code in reply["content"]["application/json"]["examples"]
    }


def test_every_json_body_has_an_example(document: dict[str, Any], operations: dict[Any, dict[str, Any]]) -> None:
    seen = 0
    for route, operation in operations.items():
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" in content:
            name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert document["components"]["schemas"][name]["examples"], route
            seen += 1
    assert seen >= 10


def test_every_reply_has_an_example(operations: dict[Any, dict[str, Any]]) -> None:
    for route, operation in operations.items():
        for status, reply in operation["responses"].items():
            if status < "300" and route != ("GET", "/health"):
                assert all(media["example"] for media in reply["content"].values()), route
        assert operation.get("description") or route == ("GET", "/health"), route


def test_examples_of_errors_are_of_the_shape_that_is_sent(operations: dict[Any, dict[str, Any]]) -> None:
    known = {
        kind.code: kind.http_status
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.DeltaServeError)
    }
    for route, operation in operations.items():
        for status, reply in operation["responses"].items():
            if status < "400" or route == ("GET", "/health"):
                continue
            for code, example in reply["content"]["application/json"]["examples"].items():
                (error,) = example["value"].values()
                assert (error["code"], known[code]) == (code, int(status)), route
                assert error.keys() == {"message", "type", "param", "code"} and error["message"], (route, code)


def test_routes_name_the_errors_that_are_theirs(operations: dict[Any, dict[str, Any]]) -> None:
    for route, operation in operations.items():
        if route != ("GET", "/health"):
            assert {"invalid_api_key", "insufficient_permissions", "internal_error"} <= codes(operation), route
    chat, upload = operations["POST", "/v1/chat/completions"], operations["PUT", "/v1/deltas/{name}"]
    assert {"model_not_found", "context_length_exceeded", "queue_full", "draining", "invalid_json"} <= codes(chat)
    assert {"artifact_corrupt", "base_mismatch", "quota_exceeded", "insufficient_storage"} <= codes(upload)
    assert "Retry-After" in chat["responses"]["429"]["headers"]
