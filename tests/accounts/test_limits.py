"""Buckets fill evenly, debts are paid, sequences are counted, and no request leaves anything behind."""

from __future__ import annotations

import random
from typing import Any

import pytest

from deltaserve.errors import BadRequest, QuotaExceeded, RateLimited
from deltaserve.ids import DeltaDigest
from deltaserve.tenants.limits import Gate, Limits, Ticket

ME, OTHER = 1, 2


class Door:
    """A gate, and the headers of the last request."""

    def __init__(self, clock: Any) -> None:
        self.gate = Gate(clock)
        self.headers: dict[str, str] = {}

    def enter(self, limits: Limits, tenant: int = ME) -> Ticket:
        self.headers = {}
        return self.gate.enter(tenant, limits, self.headers)

    def ask(self, limits: Limits, prompt: int, answer: int = 0, tenant: int = ME) -> None:
        ticket = self.enter(limits, tenant)
        ticket.begin(1, prompt)
        ticket.spend(answer)
        ticket.end()


@pytest.fixture
def door(clock: Any) -> Door:
    return Door(clock)


def refused(call: Any) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        call()
    return caught.value


def test_a_minutes_requests_may_come_at_once_and_then_one_by_one(door: Door, clock: Any) -> None:
    limits = Limits(requests_per_minute=6)
    for left in (5, 4, 3, 2, 1, 0):
        door.ask(limits, 1)
        assert door.headers["x-ratelimit-remaining-requests"] == str(left)
    assert (door.headers["x-ratelimit-limit-requests"], door.headers["x-ratelimit-reset-requests"]) == ("6", "1m0s")
    error = refused(lambda: door.ask(limits, 1))
    assert (error.retry_after_s, error.http_status, error.code) == (10, 429, "rate_limit_exceeded")
    assert door.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 9.9
    assert refused(lambda: door.ask(limits, 1)).retry_after_s == 1
    clock.now += 0.2
    door.ask(limits, 1)


def test_an_answer_may_overdraw_and_the_next_request_waits_until_the_debt_is_paid(door: Door, clock: Any) -> None:
    limits = Limits(tokens_per_minute=600)
    door.ask(limits, 100, answer=800)
    error = refused(lambda: door.ask(limits, 10))
    assert error.retry_after_s == 31
    clock.now += 30.9
    refused(lambda: door.ask(limits, 10))
    clock.now += 0.2
    door.ask(limits, 10)


def test_a_long_debt_is_told_in_steps_that_clients_wait_for(door: Door) -> None:
    limits = Limits(tokens_per_minute=60)
    door.ask(limits, 10, answer=10_000)
    assert refused(lambda: door.ask(limits, 1)).retry_after_s == 120


def test_a_prompt_over_a_minutes_tokens_waits_for_a_full_bucket(door: Door, clock: Any) -> None:
    limits = Limits(tokens_per_minute=60)
    door.ask(limits, 1)
    refused(lambda: door.ask(limits, 100))
    clock.now += 1
    door.ask(limits, 100)


def test_sequences_are_counted_from_begin_to_end(door: Door) -> None:
    limits = Limits(max_concurrent=3)
    first, second = door.enter(limits), door.enter(limits)
    first.begin(2, 1)
    error = refused(lambda: second.begin(2, 1))
    assert error.retry_after_s == 1
    second.begin(1, 1)
    first.end()
    first.end()
    door.enter(limits).begin(2, 1)
    refused(lambda: door.enter(limits).begin(1, 1))
    with pytest.raises(BadRequest, match="at once"):
        door.enter(limits).begin(4, 1)


def test_models_in_use_are_weighed_once_and_together(door: Door) -> None:
    limits, a, b = Limits(max_resident_bytes=100), DeltaDigest("a"), DeltaDigest("b")
    first, second, third = (door.enter(limits) for _ in range(3))
    first.begin(1, 1, {a: 60})
    second.begin(1, 1, {a: 60})
    assert "120 bytes" in refused(lambda: third.begin(1, 1, {b: 60})).message
    third.begin(1, 1)
    door.enter(limits, OTHER).begin(1, 1, {b: 60})
    first.end()
    first.end()
    refused(lambda: door.enter(limits).begin(1, 1, {b: 60}))
    second.end(did_run=False)
    door.enter(limits).begin(1, 1, {b: 60})
    with pytest.raises(QuotaExceeded, match="101 bytes"):
        door.enter(limits).begin(1, 1, {a: 60, b: 41})


def test_what_did_not_run_costs_no_tokens_and_no_place(door: Door) -> None:
    limits = Limits(tokens_per_minute=100, max_concurrent=1)
    for _ in range(5):
        ticket = door.enter(limits)
        ticket.begin(1, 80)
        ticket.end(did_run=False)
    door.ask(limits, 80)


def test_tenants_have_buckets_of_their_own(door: Door) -> None:
    limits = Limits(requests_per_minute=1, tokens_per_minute=10, max_concurrent=1)
    door.ask(limits, 10)
    refused(lambda: door.ask(limits, 1))
    door.ask(limits, 10, tenant=OTHER)


def test_a_tenant_without_limits_has_no_headers(door: Door) -> None:
    door.ask(Limits(), 10**9, answer=10**9)
    assert door.headers == {}


def test_a_changed_limit_keeps_what_was_used(door: Door) -> None:
    door.ask(Limits(requests_per_minute=10), 1)
    for _ in range(4):
        door.ask(Limits(requests_per_minute=10), 1)
    door.enter(Limits(requests_per_minute=100))
    assert door.headers["x-ratelimit-remaining-requests"] == "49"
    door.enter(Limits(requests_per_minute=4))
    refused(lambda: door.enter(Limits(requests_per_minute=4)))
    assert "x-ratelimit-limit-requests" not in (door.enter(Limits()) and door.headers)


def test_over_any_hour_no_more_runs_than_the_limit_and_one_bucket(door: Door, clock: Any) -> None:
    chance, limits, begun, ran = random.Random(3), Limits(requests_per_minute=30, tokens_per_minute=600), clock.now, 0
    tokens = 0
    while clock.now < begun + 3600:
        clock.now += chance.expovariate(2)
        prompt, answer = chance.randint(1, 40), chance.randint(0, 40)
        try:
            door.ask(limits, prompt, answer)
        except RateLimited:
            continue
        ran, tokens = ran + 1, tokens + prompt + answer
    assert ran <= 30 * 61
    assert 600 * 55 < tokens <= 600 * 61 + 40, "and hardly less: the bucket is emptied as it fills"


def test_uploads_at_once_fit_into_what_may_be_stored(door: Door) -> None:
    limits = Limits(max_bytes=100)
    with door.gate.upload(ME, limits, 60):
        with door.gate.upload(ME, limits, 40), door.gate.upload(OTHER, limits, 100):
            pass
        assert refused(lambda: door.gate.upload(ME, limits, 41).__enter__()).retry_after_s == 1
        with pytest.raises(RuntimeError), door.gate.upload(ME, limits, 40):
            raise RuntimeError
    with door.gate.upload(ME, limits, 100):
        pass
    with door.gate.upload(ME, Limits(), 10**12), door.gate.upload(ME, Limits(), 10**12):
        pass
