"""Free + held = all, and no block is held twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.types import Request, SamplingParams
from deltaserve.ids import RequestId


class Mute:
    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:  # noqa: ARG002
        return "", None

    def finish(self) -> str:
        return ""


def make_request() -> Request:
    return Request(
        id=RequestId("r"),
        digest=None,
        prompt_ids=[1],
        params=SamplingParams(max_tokens=1),
        eos_ids=frozenset(),
        vocab_size=10,
        sink=Mute(),
        emit=lambda event: None,
    )


def test_a_request_gets_as_many_blocks_as_its_tokens_need() -> None:
    pool, request = BlockPool(5, 4), make_request()
    for tokens, blocks in [(0, 0), (1, 1), (4, 1), (5, 2), (3, 2), (20, 5)]:
        assert pool.try_grow(request, tokens)
        assert len(request.blocks) == blocks
    assert pool.num_free == 0


def test_growth_beyond_what_is_free_is_refused_and_takes_nothing() -> None:
    pool, one, two = BlockPool(5, 4), make_request(), make_request()
    assert pool.try_grow(one, 12)
    assert not pool.try_grow(two, 12)
    assert (two.blocks, pool.num_free) == ([], 2)
    assert not pool.try_grow(one, 21)
    assert (len(one.blocks), pool.num_free) == (3, 2)


def test_blocks_that_are_held_stay_the_same_while_a_request_grows() -> None:
    pool, request = BlockPool(8, 2), make_request()
    pool.try_grow(request, 6)
    before = list(request.blocks)
    pool.try_grow(request, 12)
    assert request.blocks[:3] == before


def test_releasing_twice_gives_back_once() -> None:
    pool, request = BlockPool(4, 2), make_request()
    pool.try_grow(request, 5)
    pool.release(request)
    pool.release(request)
    assert pool.num_free == 4


@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 40))), max_size=40),
)
def test_free_and_held_are_all_blocks_each_once(
    num_blocks: int, size: int, moves: list[tuple[int, int | None]]
) -> None:
    pool, requests = BlockPool(num_blocks, size), [make_request() for _ in range(4)]
    for who, tokens in moves:
        if tokens is None:
            pool.release(requests[who])
        else:
            pool.try_grow(requests[who], tokens)
        held = [block for request in requests for block in request.blocks]
        assert sorted([*held, *pool._free]) == list(range(num_blocks))
        assert pool.num_free == num_blocks - len(held)
