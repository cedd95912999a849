"""KV is found again by the same tenant, weights and text, and by nobody else; free + held are all blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.types import Request

from .gate import Gate, advance, make, make_request, plan, spans

SALT = b"a salt of this process"


def compute(pool: BlockPool, request: Request, num_tokens: int | None = None) -> Request:
    """As if `request` had run: its first `num_tokens` tokens are in its blocks."""
    assert pool.try_start(request)
    request.num_computed = len(request.tokens) if num_tokens is None else num_tokens
    pool.publish(request)
    return request


def found(pool: BlockPool, num_tokens: int = 20, digest: str | None = None, tenant: str = "", skip: int = 0) -> int:
    """Tokens that a new request would find computed."""
    request = make_request(num_tokens, digest)
    request.tokens = [token + skip for token in request.tokens]
    request.tenant = tenant
    return len(pool._find(request)[0]) * pool.block_size


def test_a_request_finds_the_full_blocks_of_one_that_began_alike() -> None:
    pool = BlockPool(20, 4, SALT)
    first = compute(pool, make_request(18))
    second = make_request(20)
    assert pool.try_start(second)
    assert second.num_computed == 16
    assert second.blocks[:4] == first.blocks[:4]
    assert pool.num_free == 20 - 5 - 1


def test_the_last_token_is_always_computed() -> None:
    pool = BlockPool(20, 4, SALT)
    pool.release(compute(pool, make_request(16)))
    assert [found(pool, length) for length in (16, 17, 4, 5, 1)] == [12, 16, 0, 4, 0]


def test_a_mixture_finds_what_all_its_models_have_computed_and_leaves_each_its_own() -> None:
    pool = BlockPool(40, 4, SALT)
    pool.release(compute(pool, make_request(18, "a")))
    mixture = make_request(20, "a", "b")
    assert pool.try_start(mixture)
    assert (mixture.num_computed, [len(row.blocks) for row in mixture.rows]) == (0, [5, 5])
    pool.release(compute(pool, make_request(10, "b")))
    pool.release(mixture)
    again = compute(pool, make_request(20, "a", "b"), 20)
    assert len({block for row in again.rows for block in row.blocks}) == 10
    pool.release(again)
    assert (found(pool, 21, "a"), found(pool, 21, "b"), pool.num_free) == (20, 20, 40)
    assert pool.try_start(mixture := make_request(21, "b", "a"))
    assert mixture.num_computed == 20


def test_what_is_not_computed_yet_is_not_found() -> None:
    pool = BlockPool(20, 4, SALT)
    compute(pool, make_request(18), 7)
    assert found(pool) == 4


def test_kv_outlives_its_request_until_the_block_is_needed() -> None:
    pool = BlockPool(5, 4, SALT)
    pool.release(compute(pool, make_request(16)))
    assert pool.num_free == 5
    assert found(pool, 17) == 16
    other = make_request(8, "other")
    assert pool.try_start(other)
    assert found(pool, 12) == 8, "the end of a text goes before its beginning"


def test_the_least_recently_used_goes_first() -> None:
    pool = BlockPool(4, 4, SALT)
    for name in ("a", "b"):
        pool.release(compute(pool, make_request(8, name)))
    pool.release(compute(pool, make_request(8, "a")))
    pool.release(compute(pool, make_request(4, "c")))
    assert (found(pool, 9, "a"), found(pool, 5, "b")) == (8, 4)


def test_other_weights_another_tenant_and_another_text_find_nothing() -> None:
    pool = BlockPool(40, 4, SALT)
    mine = make_request(18, "digest")
    mine.tenant = "acme"
    pool.release(compute(pool, mine))
    assert found(pool, 20, "digest", "acme") == 16
    assert found(pool, 20, "digest-2", "acme") == 0
    assert found(pool, 20, None, "acme") == 0
    assert found(pool, 20, "digest", "") == 0
    assert found(pool, 20, "digest", "emca") == 0
    assert found(pool, 20, "digest", "acme", skip=1) == 0
    assert found(pool, 20, None, "acmedigest") == found(pool, 20, "acmedigest", "") == 0


def test_a_block_is_known_by_all_that_comes_before_it() -> None:
    pool = BlockPool(40, 4, SALT)
    pool.release(compute(pool, make_request(18)))
    other = make_request(18)
    other.tokens[0] = 999
    assert pool.try_start(other)
    assert other.num_computed == 0


def test_two_processes_do_not_know_each_others_keys() -> None:
    one, two = BlockPool(20, 4, SALT), BlockPool(20, 4, b"another salt")
    keys = [compute(pool, make_request(18)).block_keys for pool in (one, two)]
    assert set(keys[0]).isdisjoint(keys[1])


def test_without_a_salt_nothing_is_found() -> None:
    pool = BlockPool(20, 4)
    pool.release(compute(pool, make_request(18)))
    assert found(pool) == 0


def test_what_is_not_sound_is_forgotten_with_its_request() -> None:
    pool = BlockPool(20, 4, SALT)
    request = compute(pool, make_request(18))
    assert found(pool) == 16
    pool.release(compute(pool, make_request(18)), sound=False)
    assert found(pool) == 0
    pool.release(request)
    assert found(pool) == 0, "its keys were taken back while it ran"


def test_a_prompt_whose_log_probabilities_are_asked_for_is_read() -> None:
    pool = BlockPool(20, 4, SALT)
    pool.release(compute(pool, make_request(18)))
    request = make_request(18)
    request.params = replace(request.params, prompt_logprobs=True)
    assert pool.try_start(request)
    assert request.num_computed == 0


def test_shared_blocks_are_held_until_the_last_one_lets_go() -> None:
    pool = BlockPool(6, 4, SALT)
    first, second = compute(pool, make_request(17)), make_request(17)
    assert pool.try_start(second)
    assert pool.num_free == 0
    pool.release(first)
    assert pool.num_free == 1
    assert not pool.try_start(make_request(8, "other"))
    pool.release(second)
    assert pool.num_free == 6


def test_answers_are_found_too_by_the_conversation_that_goes_on() -> None:
    scheduler = make(seats=2)
    scheduler.blocks._salt = SALT
    first = make_request(6)
    scheduler.add(first)
    while first.num_generated < 8:
        advance(plan(scheduler))
    scheduler.remove(first)
    again = make_request(1)
    again.prompt_ids = [*first.tokens, 1, 2, 3]
    again.tokens = list(again.prompt_ids)
    scheduler.add(again)
    assert spans(plan(scheduler)) == {again.id: (12, 5)}
    assert again.num_cached == 12


def test_the_second_of_two_that_run_at_once_shares_what_the_first_has_read() -> None:
    scheduler = make(budget=40)
    scheduler.blocks._salt = SALT
    first, second = make_request(18), make_request(18)
    scheduler.add(first)
    advance(plan(scheduler))
    scheduler.add(second)
    assert spans(plan(scheduler)) == {first.id: (18, 1), second.id: (16, 2)}
    assert (first.num_cached, second.num_cached) == (0, 16)


def test_a_preempted_request_finds_its_own_and_is_charged_and_counted_once() -> None:
    scheduler = make(blocks=5, budget=40, gate=Gate({"a": 0}))
    scheduler.blocks._salt = SALT
    first, last = make_request(8), make_request(8, "a")
    for request in (first, last):
        scheduler.add(request)
    for _ in range(2):
        advance(plan(scheduler))
    assert scheduler.num_preemptions == 1
    scheduler.remove(first)
    ((start, size),) = spans(plan(scheduler)).values()
    assert (start, start + size) == (8, len(last.tokens))
    assert last.num_cached == 0
    assert scheduler.waiting.counter("a") == 8 + 2 * 2


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from(["start", "grow", "release", "spoil"]), st.integers(1, 30), st.booleans()
        ),
        max_size=60,
    ),
)
def test_free_and_held_are_all_blocks_and_every_key_leads_to_its_tokens(
    num_blocks: int, size: int, moves: list[tuple[int, str, int, bool]]
) -> None:
    pool = BlockPool(num_blocks, size, SALT)
    live: dict[int, Request] = {}
    holds: dict[int, tuple[object, ...]] = {}  # block → what was written there: all tokens up to its end
    for who, move, tokens, other in moves:
        request = live.get(who)
        if request is None and move == "start":
            request = make_request(tokens, "d" if other else None)
            if not pool.try_start(request):
                continue
            live[who] = request
            for place in range(request.num_computed // size):
                written = (request.digest, *request.tokens[: (place + 1) * size])
                assert holds[request.blocks[place]] == written
        elif request is not None and move == "grow":
            request.tokens.append(tokens % 3)
            if not pool.try_grow(request, len(request.tokens)):
                request.tokens.pop()
        elif request is not None:
            pool.release(live.pop(who), sound=move == "release")
            request = None
        if request is not None:
            for place in range(request.num_computed // size, len(request.tokens) // size):
                holds[request.blocks[place]] = (request.digest, *request.tokens[: (place + 1) * size])
            request.num_computed = len(request.tokens)
            pool.publish(request)
        held = {block for one in live.values() for block in one.blocks}
        assert held | set(pool._free) == set(range(num_blocks))
        assert held.isdisjoint(pool._free)
        counts = [sum(block in one.blocks for one in live.values()) for block in range(num_blocks)]
        assert counts == pool._holders
        assert {pool._block_of[key]: key for key in pool._block_of} == pool._key_of
    assert pool.num_free == num_blocks - len({block for one in live.values() for block in one.blocks})


@pytest.mark.parametrize("sound", [True, False])
def test_releasing_twice_gives_back_once(sound: bool) -> None:
    pool = BlockPool(6, 4, SALT)
    request = compute(pool, make_request(18))
    pool.release(request, sound=sound)
    pool.release(request, sound=sound)
    assert pool.num_free == 6
