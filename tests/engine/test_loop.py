"""Every request ends with exactly one event that says so, whatever happens around it."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.engine.types import Event, FinishReason, TokenLogprob
from deltaserve.errors import (
    ContextLengthExceeded,
    DeltaLoadFailed,
    Draining,
    EngineFailure,
    NumericalError,
    QueueFull,
)
from deltaserve.ids import RequestId

from .house import DAMAGED, EOS, WAIT_S, Client, House

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def make_house() -> Iterator[Callable[..., House]]:
    houses: list[House] = []

    def make(**options: Any) -> House:
        houses.append(House(**options))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


@pytest.fixture
def house(make_house: Callable[..., House]) -> House:
    return make_house()


def test_an_answer_ends_at_its_length(house: House) -> None:
    client = house.client(max_tokens=3).submit()
    last = client.wait()
    assert (last.finish_reason, last.stop_reason, last.error) == (FinishReason.LENGTH, None, None)
    assert (client.text, client.tokens) == ("abc.", [97, 98, 99])


def test_a_stop_string_ends_an_answer_and_is_named(house: House) -> None:
    client = house.client(stop="c", max_tokens=10).submit()
    last = client.wait()
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "c")
    assert client.text == "ab"


def test_the_end_of_sequence_ends_an_answer_and_is_not_text(house: House) -> None:
    client = house.client().says(97, EOS).submit()
    last = client.wait()
    assert (last.finish_reason, last.stop_reason, last.token_ids) == (FinishReason.STOP, None, (EOS,))
    assert client.text == "a."


def test_a_stop_token_ends_an_answer_and_is_named(house: House) -> None:
    client = house.client(stop_token_ids=(98,)).submit()
    assert (client.wait().finish_reason, client.wait().stop_reason) == (FinishReason.STOP, 98)


def test_ignore_eos_goes_on_to_the_length(house: House) -> None:
    client = house.client(ignore_eos=True, max_tokens=3).says(EOS, EOS, EOS).submit()
    assert client.wait().finish_reason == FinishReason.LENGTH
    assert client.tokens == [EOS] * 3


def test_min_tokens_holds_every_kind_of_end_back(house: House) -> None:
    eos = house.client(min_tokens=3, max_tokens=5).says(EOS, 97, EOS).submit()
    token = house.client(min_tokens=3, max_tokens=5, stop_token_ids=(98,)).says(98, 98, 98).submit()
    string = house.client(min_tokens=3, max_tokens=5, stop="x").says(120, 120, 120).submit()
    for client in (eos, token, string):
        assert client.wait().finish_reason == FinishReason.STOP
        assert len(client.tokens) == 3
    assert string.text == "xx"


def test_no_tokens_asked_for_are_no_tokens(house: House) -> None:
    client = house.client(max_tokens=0).submit()
    assert client.wait() == Event(finish_reason=FinishReason.LENGTH)
    assert len(client.events) == 1


def test_prompt_logprobs_come_once_with_the_first_event(house: House) -> None:
    for tokens in (0, 3):
        client = house.client(max_tokens=tokens, prompt_logprobs=True).submit()
        client.wait()
        assert [bool(event.prompt_logprobs) for event in client.events] == [True] + [False] * (len(client.events) - 1)
        assert client.events[0].prompt_logprobs[0] == TokenLogprob(1, None)


def test_a_waiting_request_is_cancelled(house: House) -> None:
    client = house.client(digest="away").submit()
    house.engine.cancel(client.request.id)
    assert client.wait() == Event(finish_reason=FinishReason.CANCELLED)


def test_a_running_request_is_cancelled_and_its_neighbour_goes_on(house: House) -> None:
    house.runner.hold.clear()
    gone, stays = house.client(max_tokens=10**6).submit(), house.client(max_tokens=5)
    assert house.runner.entered.wait(WAIT_S)
    house.engine.cancel(gone.request.id)
    stays.submit()
    house.runner.hold.set()
    assert gone.wait().finish_reason == FinishReason.CANCELLED
    assert stays.wait().finish_reason == FinishReason.LENGTH


def test_cancelling_what_has_ended_or_never_was_does_nothing(house: House) -> None:
    client = house.client().submit()
    client.wait()
    house.engine.cancel(client.request.id)
    house.engine.cancel(RequestId("nobody"))
    assert house.client().submit().wait().finish_reason == FinishReason.LENGTH
    assert len([event for event in client.events if event.finish_reason]) == 1


def test_a_step_that_fails_ends_the_request_at_fault_alone(house: House) -> None:
    house.runner.hold.clear()
    waiting = house.client(digest="away").submit()
    bad, *good = (house.client() for _ in range(3))
    house.runner.culprits.add(bad.request.id)
    house.engine.submit([client.request for client in (good[0], bad, good[1])])
    house.runner.hold.set()
    last = bad.wait()
    assert (last.finish_reason, type(last.error), bad.tokens) == (FinishReason.ERROR, EngineFailure, [])
    assert "secret" not in str(last.error)
    for client in good:
        assert (client.wait().finish_reason, client.tokens) == (FinishReason.LENGTH, [97, 98, 99, 100])
    assert not waiting.events
    house.gate.slots["away"] = 0
    house.engine.wake()
    assert waiting.wait().finish_reason == FinishReason.LENGTH


def test_a_step_that_fails_once_costs_nobody_anything(house: House) -> None:
    house.runner.failures.append(RuntimeError("out of memory"))
    house.runner.hold.clear()
    clients = [house.client() for _ in range(3)]
    house.engine.submit([client.request for client in clients])
    house.runner.hold.set()
    for client in clients:
        assert (client.wait().finish_reason, client.tokens) == (FinishReason.LENGTH, [97, 98, 99, 100])


def test_a_lost_device_ends_every_request_and_the_engine(house: House) -> None:
    house.runner.failures.append(torch.AcceleratorError("the context is gone", 1))
    house.runner.hold.clear()
    clients = [house.client() for _ in range(2)]
    house.engine.submit([client.request for client in clients])
    house.runner.hold.set()
    for client in clients:
        assert isinstance(client.wait().error, EngineFailure | Draining)
    house.engine._thread.join(WAIT_S)
    assert not house.engine.is_alive
    with pytest.raises(Draining):
        house.client().submit()


def test_a_request_whose_text_cannot_be_made_fails_alone(house: House) -> None:
    bad, good = house.client().says(97, 13), house.client()
    house.engine.submit([bad.request, good.request])
    assert isinstance(bad.wait().error, EngineFailure)
    assert good.wait().finish_reason == FinishReason.LENGTH


def test_a_client_that_cannot_be_told_disturbs_nobody(house: House) -> None:
    deaf, good = house.client(), house.client()
    deaf.deaf = True
    house.engine.submit([deaf.request, good.request])
    assert good.wait().finish_reason == FinishReason.LENGTH
    assert deaf.ended.wait(WAIT_S)
    assert house.engine.is_alive
    assert house.client().submit().wait().finish_reason == FinishReason.LENGTH


def test_a_row_that_is_not_finite_fails_its_request_alone(house: House) -> None:
    bad, good = house.client().says(97, DAMAGED), house.client()
    house.engine.submit([bad.request, good.request])
    assert isinstance(bad.wait().error, NumericalError)
    assert DAMAGED not in bad.tokens
    assert good.wait().finish_reason == FinishReason.LENGTH


def test_a_delta_that_does_not_load_fails_its_request(house: House) -> None:
    house.gate.failure = DeltaLoadFailed("damaged")
    base, bad = house.client().submit(), house.client(digest="bad").submit()
    assert bad.wait().error is house.gate.failure
    assert bad.tokens == []
    assert base.wait().finish_reason == FinishReason.LENGTH


def test_a_request_that_waits_for_its_delta_runs_when_it_is_woken(house: House) -> None:
    client = house.client(digest="away").submit()
    assert house.client().submit().wait()
    assert not client.events
    house.gate.slots["away"] = 0
    house.engine.wake()
    assert client.wait().finish_reason == FinishReason.LENGTH


def test_a_slot_that_comes_free_by_time_alone_is_found(house: House) -> None:
    client = house.client(digest="away").submit()
    assert house.client().submit().wait()
    house.gate.slots["away"] = 0
    assert client.wait().finish_reason == FinishReason.LENGTH


def test_an_idle_engine_runs_no_steps(house: House) -> None:
    house.client(digest="away").submit()
    house.client().submit().wait()
    steps = house.runner.num_steps
    for _ in range(50):
        house.engine.wake()
    assert house.client(max_tokens=1).submit().wait()
    assert house.runner.num_steps == steps + 1


def test_stopping_ends_what_is_left_and_takes_no_more(house: House) -> None:
    house.runner.hold.clear()
    running, waiting = house.client(max_tokens=10**6).submit(), house.client(digest="away").submit()
    assert house.runner.entered.wait(WAIT_S)
    arrived = house.client().submit()
    house.engine.stop(0.0)
    with pytest.raises(Draining):
        house.client().submit()
    house.runner.hold.set()
    for client in (running, waiting, arrived):
        assert isinstance(client.wait().error, Draining)
    house.engine.stop(WAIT_S)
    with pytest.raises(Draining):
        house.client().submit()


def test_a_bug_that_stops_the_engine_ends_every_request(house: House) -> None:
    house.gate.failure = AssertionError("a bug in the gate")
    victims = [house.client(digest="any") for _ in range(3)]
    house.engine.submit([client.request for client in victims])
    for client in victims:
        assert isinstance(client.wait().error, Draining)
    with pytest.raises(Draining):
        house.client().submit()


def test_a_full_queue_takes_all_of_a_submission_or_none(make_house: Callable[..., House]) -> None:
    house = make_house(queue=3, seats=2)
    clients = [house.client(digest="away") for _ in range(8)]
    house.engine.submit([client.request for client in clients[:3]])
    with pytest.raises(QueueFull):
        house.engine.submit([client.request for client in clients[3:6]])
    assert house.engine.num_waiting == 3
    house.engine.submit([client.request for client in clients[3:5]])
    with pytest.raises(QueueFull):
        clients[5].submit()
    house.gate.slots["away"] = 0
    house.engine.wake()
    assert [client.wait().finish_reason for client in clients[:5]] == [FinishReason.LENGTH] * 5
    assert clients[5].submit().wait().finish_reason == FinishReason.LENGTH
    assert not clients[6].events


def test_one_tenant_fills_its_part_of_the_queue_and_the_others_are_still_taken(
    make_house: Callable[..., House],
) -> None:
    house = make_house(queue=6, each=2, seats=1)
    house.runner.hold.clear()
    first = house.client().submit()
    assert house.runner.entered.wait(WAIT_S)
    flood = [house.client(digest="away") for _ in range(4)]
    house.engine.submit([client.request for client in flood[:2]])
    with pytest.raises(QueueFull, match="2 of your requests are waiting and at most 2 of one tenant may"):
        flood[2].submit()
    others = [house.client().submit() for _ in range(2)]
    assert house.engine.num_waiting == 4
    house.gate.slots["away"] = 0
    house.runner.hold.set()
    house.engine.wake()
    for client in (first, *flood[:2], *others):
        assert client.wait().finish_reason == FinishReason.LENGTH
    assert flood[3].submit().wait().finish_reason == FinishReason.LENGTH


def test_a_request_that_outgrows_the_cache_fails_and_the_next_one_runs(make_house: Callable[..., House]) -> None:
    house = make_house(blocks=2)
    large, small = house.client(max_tokens=100).submit(), house.client().submit()
    assert isinstance(large.wait().error, ContextLengthExceeded)
    assert small.wait().finish_reason == FinishReason.LENGTH


def test_a_preempted_request_still_says_each_token_once(make_house: Callable[..., House]) -> None:
    house = make_house(blocks=4)
    clients = [house.client(max_tokens=12) for _ in range(3)]
    house.engine.submit([client.request for client in clients])
    for client in clients:
        client.wait()
        assert client.tokens == list(range(97, 109))


def test_no_wake_up_is_lost_and_every_request_of_many_threads_ends_once(make_house: Callable[..., House]) -> None:
    house = make_house(queue=10**6, blocks=24, budget=9)
    clients: list[Client] = []

    def work(seed: int) -> None:
        for i in range(25):
            digest = f"d{(seed + i) % 3}" if i % 2 else None
            client = house.client(digest=digest, max_tokens=1 + i % 7, stop="c" if i % 3 else None)
            clients.append(client.submit())
            if i % 5 == 0:
                house.engine.cancel(client.request.id)
            if i % 4 == 3:
                client.ended.wait(WAIT_S)

    def load() -> None:
        for i in range(3):
            house.gate.slots[f"d{i}"] = i
            house.engine.wake()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    load()
    for thread in threads:
        thread.join(WAIT_S)
    reasons = Counter(client.wait().finish_reason for client in clients)
    assert len(clients) == 100
    assert set(reasons) <= {FinishReason.LENGTH, FinishReason.STOP, FinishReason.CANCELLED}
