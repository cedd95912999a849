"""When a mixture runs: in all its models at once, and never so that two wait for each other."""

from __future__ import annotations

from collections import Counter

import pytest

from deltaserve.errors import BadRequest
from deltaserve.ids import BASE_SLOT

from .gate import Gate, advance, make, make_request, plan, spans


def test_a_mixture_runs_in_all_its_models_at_once_or_not_at_all() -> None:
    gate = Gate({"a": 0})
    mixed, plain = make_request(4, "a", "b", None), make_request(4, "a")
    scheduler = make(mixed, plain, gate=gate, budget=9)
    assert spans(plan(scheduler)) == {plain.id: (0, 4)}
    scheduler.remove(plain)
    gate.slots["b"] = 1
    chunks = plan(scheduler)
    assert spans(chunks) == {mixed.id: (0, 3)}  # 9 tokens of the step over 3 rows
    assert [(row.slot, len(row.blocks)) for row in mixed.rows] == [(0, 1), (1, 1), (BASE_SLOT, 1)]
    advance(chunks)
    scheduler.remove(mixed)
    assert all((row.blocks, row.pinned) == ([], False) for row in mixed.rows)


def test_one_waiting_mixture_keeps_what_it_has_and_a_second_one_takes_nothing() -> None:
    """Each needs what the other could hold: with both holding, neither would ever run."""
    gate = Gate({"a": 0, "c": 1})
    first, second = make_request(1, "a", "b"), make_request(1, "c", "d")
    scheduler = make(first, second, gate=gate)
    assert plan(scheduler) == []
    assert (+gate.pins, first.pinned, second.pinned) == (Counter({0: 1}), True, False)
    gate.slots |= {"b": 2, "d": 3}
    assert spans(plan(scheduler)) == {first.id: (0, 1), second.id: (0, 1)}
    gathering, other = make_request(1, "a", "x"), make_request(1, "c", "x")
    for request in (gathering, other):
        scheduler.add(request)
    plan(scheduler)
    scheduler.remove(gathering)
    plan(scheduler)
    assert (gathering.pinned, other.pinned) == (False, True)


def test_what_the_mixture_that_keeps_pins_lacks_comes_first_in_turn() -> None:
    """Otherwise what is loaded for another in the slot it waits for would wait for the slots it holds."""
    gate = Gate({"a": 0, "c": 1})
    gathering, other = make_request(1, "a", "b"), make_request(1, "c", "d")
    gathering.tenant, other.tenant = "late", "early"
    scheduler = make(gathering, gate=gate)
    plan(scheduler)
    scheduler.waiting.charge("late", 100, 0)
    scheduler.add(other)
    plan(scheduler)
    assert (gate.wanted, gate.held) == (["b", "c", "d"], {"a"})
    assert gate.pins == Counter({0: 1}), "a pin for nothing would make the other's delta leave"


@pytest.mark.parametrize(("seats", "blocks", "most"), [(1, 100, 9), (8, 3, 9), (8, 100, 1)])
def test_a_mixture_that_could_never_run_fails_and_the_next_one_runs(seats: int, blocks: int, most: int) -> None:
    gate = Gate({"a": 0, "b": 1}, most=most)
    mixed, plain = make_request(5, "a", "b"), make_request(5, "a")
    scheduler = make(mixed, plain, gate=gate, seats=seats, blocks=blocks)
    chunks, [(request, error)] = scheduler.plan()
    assert (request, spans(chunks)) == (mixed, {plain.id: (0, 5)})
    assert isinstance(error, BadRequest)


def test_a_mixture_waits_for_seats_for_all_its_models_and_none_overtakes_it() -> None:
    running, mixed, late = make_request(1), make_request(1, None, None), make_request(1)
    scheduler = make(running, seats=2)
    plan(scheduler)
    scheduler.add(mixed)
    scheduler.add(late)
    assert mixed.id not in spans(plan(scheduler))
    scheduler.remove(running)
    assert spans(plan(scheduler)) == {mixed.id: (0, 1)}
    assert scheduler.num_free_seats == 0
