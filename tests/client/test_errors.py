"""Which class each refusal becomes, and what it carries."""

from __future__ import annotations

import inspect

import httpx
import pytest

import deltaserve_client as package
from deltaserve_client import errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequest),
        (401, errors.Unauthorized),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (412, errors.PreconditionFailed),
        (413, errors.TooLarge),
        (422, errors.Unprocessable),
        (429, errors.RateLimited),
        (500, errors.ServerError),
        (502, errors.ServerError),
        (503, errors.Unavailable),
        (507, errors.StorageFull),
        (307, errors.ApiError),
    ],
)
@pytest.mark.parametrize(("method", "args"), [("delta", ["a"]), ("stream", ["m", "p"])])
def test_every_status_has_its_class(wire, status, kind, method, args):
    body = {"error": {"message": "why", "type": "t", "param": "name", "code": "the_code"}}
    headers = {"x-request-id": "r-1", "retry-after": "7"}
    wire.settings["retries"] = 0
    with pytest.raises(errors.ApiError) as caught:
        wire.ask(httpx.Response(status, json=body, headers=headers), method, *args)
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.message, error.param) == (status, "the_code", "why", "name")
    assert (error.request_id, error.retry_after_s) == ("r-1", 7)
    assert str(error) == f"why ({status} the_code, param name, request r-1)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<h1>Bad gateway</h1>", "<h1>Bad gateway</h1>"),
        (b"", "Bad Gateway"),
        (b'{"detail": "x"}', '{"detail": "x"}'),
        (b'{"error": "text"}', '{"error": "text"}'),
    ],
)
def test_a_proxys_error_page_is_an_api_error_too(wire, content, message):
    with pytest.raises(errors.ServerError) as caught:
        wire.ask(httpx.Response(502, content=content), "version")
    assert (caught.value.message, caught.value.code, caught.value.request_id) == (message, "http_502", None)


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.ReadTimeout(""), httpx.ReadError("reset")])
def test_no_reply_is_connection_failed_and_says_where(wire, failure):
    def fail(_):
        raise failure

    wire.settings["retries"] = 0
    with pytest.raises(errors.ConnectionFailed, match=r"GET /version to 127\.0\.0\.1: \w+"):
        wire.ask(fail, "version")


def test_the_tree_in_the_docstring_is_the_tree():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert all(issubclass(kind, errors.DeltaServeClientError) for kind in kinds)
    drawn = [line.split("─ ")[-1].split()[0] for line in errors.__doc__.splitlines() if line.startswith("    ")]
    assert sorted(drawn) == sorted(kind.__name__ for kind in kinds)


def test_public_names_are_exactly_all():
    assert package.__all__ == sorted(package.__all__, key=lambda name: (not name.isupper(), name))
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert kinds <= set(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
