"""What is sent again, how often, and after how long. No test sleeps: the waits are recorded."""

from __future__ import annotations

import httpx
import pytest

from deltaserve_client import ApiError, ConnectionFailed, RateLimited, Unavailable


def failing(*failures):
    """A server that answers or fails as told, one a request, and then well."""
    script = iter(failures)

    def handle(_):
        failure = next(script, None)
        if failure is None:
            return httpx.Response(200, json={"version": "1", "data": []})
        if isinstance(failure, Exception):
            raise failure
        status, headers = failure
        return httpx.Response(status, headers=headers)

    return handle


REFUSED = httpx.ConnectError("refused")
LOST = httpx.ReadError("reset")
BUSY = (429, {"retry-after": "3"})
DRAINING = (503, {"retry-after": "5"})


def test_reading_is_repeated_with_growing_waits_where_none_was_asked_for(wire):
    wire.ask(failing(REFUSED, LOST), "version")
    assert wire.waits_s == [0.5, 1.0]


def test_retry_after_is_honoured(wire):
    wire.ask(failing(BUSY, DRAINING), "version")
    assert wire.waits_s == [3.0, 5.0]


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT", ""])
def test_a_retry_after_that_is_no_number_of_seconds_is_not_obeyed(wire, value):
    wire.ask(failing((429, {"retry-after": value})), "version")
    assert wire.waits_s == [0.5]


def test_a_long_wait_is_left_to_the_caller(wire):
    with pytest.raises(RateLimited) as caught:
        wire.ask(failing((429, {"retry-after": "3600"})), "version")
    assert (caught.value.retry_after_s, wire.waits_s) == (3600, [])


def test_the_last_error_is_raised_when_the_tries_are_spent(wire):
    with pytest.raises(Unavailable):
        wire.ask(failing(REFUSED, BUSY, DRAINING), "version")
    assert (len(wire.requests), wire.waits_s) == (3, [0.5, 3.0])


def test_retries_can_be_turned_off(wire):
    wire.settings["retries"] = 0
    with pytest.raises(ConnectionFailed):
        wire.ask(failing(REFUSED), "version")
    assert len(wire.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 500, 502, 507])
def test_a_refusal_is_not_repeated(wire, status):
    with pytest.raises(ApiError):
        wire.ask(failing((status, {"retry-after": "1"})), "version")
    assert len(wire.requests) == 1


COSTLY = [
    ("complete", ["m", "p"]),
    ("chat", ["m", []]),
    ("stream", ["m", "p"]),
    ("stream_chat", ["m", []]),
    ("delete", ["a"]),
]


@pytest.mark.parametrize(("method", "args"), COSTLY)
@pytest.mark.parametrize("failure", [LOST, httpx.ReadTimeout(""), httpx.WriteError("reset"), DRAINING, (500, {})])
def test_what_may_have_run_is_never_sent_again(wire, method, args, failure):
    with pytest.raises((ApiError, ConnectionFailed)):
        wire.ask(failing(failure), method, *args)
    assert (len(wire.requests), wire.waits_s) == (1, [])


@pytest.mark.parametrize(("method", "args"), COSTLY)
def test_what_surely_did_not_run_is_sent_again(wire, method, args):
    with pytest.raises(RateLimited):
        wire.ask(failing(REFUSED, httpx.ConnectTimeout(""), BUSY), method, *args)
    assert (len(wire.requests), wire.waits_s) == (3, [0.5, 1.0])
