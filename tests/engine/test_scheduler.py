"""Who runs in the next step: counting alone, with a gate that says yes, not yet or no."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.engine.scheduler import Chunk, Scheduler
from deltaserve.errors import ContextLengthExceeded, DeltaLoadFailed
from deltaserve.ids import BASE_SLOT

from .gate import Gate, advance, make, make_request, plan, spans


def test_neither_scheduler_nor_blocks_imports_torch() -> None:
    code = (
        "import deltaserve.engine.scheduler, deltaserve.engine.blocks, sys;"
        "raise SystemExit(', '.join({'torch', 'transformers', 'fastapi', 'numpy'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_requests_run_in_order_of_arrival_within_the_budget() -> None:
    a, b, c = make_request(6), make_request(6), make_request(6)
    scheduler = make(a, b, c, budget=16)
    assert spans(plan(scheduler)) == {a.id: (0, 6), b.id: (0, 6), c.id: (0, 4)}


def test_a_long_prompt_is_read_in_chunks_and_samples_at_its_end() -> None:
    request = make_request(10)
    scheduler = make(request, budget=4)
    seen = []
    for _ in range(4):
        (chunk,) = plan(scheduler)
        seen.append((chunk.start, chunk.num_tokens, chunk.samples))
        advance([chunk])
    assert seen == [(0, 4, False), (4, 4, False), (8, 2, True), (10, 1, True)]


def test_running_requests_come_before_waiting_ones() -> None:
    a, b = make_request(4), make_request(20)
    scheduler = make(a, budget=8)
    advance(plan(scheduler))
    scheduler.add(b)
    assert spans(plan(scheduler)) == {a.id: (4, 1), b.id: (0, 7)}


def test_no_more_requests_run_than_there_are_seats() -> None:
    requests = [make_request(1) for _ in range(5)]
    scheduler = make(*requests, seats=2)
    advance(plan(scheduler))
    assert scheduler.running == requests[:2]
    assert scheduler.num_free_seats == 0
    scheduler.remove(requests[0])
    assert scheduler.num_free_seats == 1
    plan(scheduler)
    assert scheduler.running == requests[1:3]


def test_a_request_whose_delta_is_not_there_waits_and_those_behind_it_run() -> None:
    gate = Gate({"here": 0})
    away, here, base = make_request(4, "away"), make_request(4, "here"), make_request(4)
    scheduler = make(away, here, base, gate=gate)
    assert spans(plan(scheduler)) == {base.id: (0, 4), here.id: (0, 4)}
    assert list(scheduler.waiting) == [away]
    assert (away.slot, away.pinned) == (BASE_SLOT, False)
    gate.slots["away"] = 1
    assert away.id in spans(plan(scheduler))
    assert away.slot == 1


def test_the_gate_hears_what_is_waited_for_in_turn() -> None:
    gate = Gate({"here": 0}, broken=["bad"])
    requests = [make_request(1, name) for name in ["b", "a", None, "bad", "b", "here", "c"]]
    scheduler = make(*requests, gate=gate)
    scheduler.waiting.charge("b", 5, 0)
    scheduler.plan()
    assert gate.wanted == ["a", "bad", "here", "c", "b"]


def test_a_slot_that_is_to_be_left_is_left_by_all_who_hold_it_and_they_go_on_later() -> None:
    gate = Gate({"a": 0, "b": 1})
    requests = [make_request(2, name) for name in ["a", "b", "a"]]
    scheduler = make(*requests, gate=gate, seats=3)
    advance(plan(scheduler))
    del gate.slots["a"]
    gate.late = [0]
    assert list(spans(plan(scheduler))) == [requests[1].id]
    assert (gate.pins[0], gate.wanted, scheduler.num_preemptions) == (0, ["a"], 2)
    assert [(r.pinned, r.slot, r.num_generated) for r in requests[::2]] == [(False, BASE_SLOT, 1)] * 2
    gate.slots["a"] = 0
    assert sorted(spans(plan(scheduler)).values()) == [(0, 3), (0, 3), (2, 1)]
    assert gate.pins[0] == 2


def test_a_failed_load_is_told_to_all_that_wait_for_it_and_to_nobody_else() -> None:
    gate = Gate({"good": 0}, broken=["bad"])
    bad, good, too = make_request(4, "bad"), make_request(4, "good"), make_request(4, "bad")
    scheduler = make(bad, good, too, gate=gate)
    chunks, failed = scheduler.plan()
    assert [(request.id, type(error)) for request, error in failed] == [
        (bad.id, DeltaLoadFailed),
        (too.id, DeltaLoadFailed),
    ]
    assert list(spans(chunks)) == [good.id]
    for request, _ in failed:
        scheduler.remove(request)
    again = make_request(4, "bad")
    scheduler.add(again)
    assert scheduler.plan()[1] == []
    assert list(scheduler.waiting) == [again]


def test_the_request_that_came_last_gives_its_blocks_back_and_is_computed_again() -> None:
    first, last = make_request(8), make_request(7)
    scheduler = make(first, last, blocks=4, budget=100)
    advance(plan(scheduler))
    chunks = plan(scheduler)
    assert spans(chunks) == {first.id: (8, 1)}
    assert scheduler.num_preemptions == 1
    assert (last.blocks, last.num_computed, list(scheduler.waiting)) == ([], 0, [last])
    assert last.tokens[7:] == [7]
    scheduler.remove(first)
    assert spans(plan(scheduler)) == {last.id: (0, 8)}


def test_a_preempted_request_goes_to_the_head_of_the_queue_and_keeps_its_pin() -> None:
    gate = Gate({"a": 0})
    first, last, new = make_request(8), make_request(8, "a"), make_request(8)
    scheduler = make(first, last, gate=gate, blocks=4, budget=100)
    advance(plan(scheduler))
    scheduler.add(new)
    plan(scheduler)
    assert list(scheduler.waiting) == [last, new]
    assert (last.pinned, gate.pins[0]) == (True, 1)


def test_preempting_takes_back_what_was_told_of_the_prompt() -> None:
    first, last = make_request(8), make_request(8)
    scheduler = make(first, last, blocks=4, budget=100)
    advance(plan(scheduler))
    last.prompt_reports.append(None)  # type: ignore[arg-type]
    plan(scheduler)
    assert last.prompt_reports == []


def test_a_request_without_room_waits_unpinned_and_is_not_overtaken() -> None:
    gate = Gate({"a": 0})
    running, large, small = make_request(12), make_request(12, "a"), make_request(1)
    scheduler = make(running, large, small, gate=gate, blocks=4, budget=100)
    assert spans(plan(scheduler)) == {running.id: (0, 12)}
    assert (large.pinned, gate.pins[0]) == (False, 0)
    scheduler.remove(running)
    assert spans(plan(scheduler)).keys() == {small.id, large.id}


def test_a_request_larger_than_all_blocks_fails_and_the_one_behind_it_runs() -> None:
    large, small = make_request(17), make_request(16)
    scheduler = make(large, small, blocks=4, budget=100)
    chunks, failed = scheduler.plan()
    assert [(request.id, type(error)) for request, error in failed] == [(large.id, ContextLengthExceeded)]
    assert spans(chunks) == {small.id: (0, 16)}


def test_a_request_that_outgrows_all_blocks_fails_and_the_one_behind_it_runs() -> None:
    alone, behind = make_request(16), make_request(16)
    scheduler = make(alone, behind, blocks=4, budget=100)
    advance(plan(scheduler))
    _, failed = scheduler.plan()
    assert [request.id for request, _ in failed] == [alone.id]
    scheduler.remove(alone)
    assert spans(plan(scheduler)) == {behind.id: (0, 16)}


def test_removing_frees_blocks_and_pin_and_may_be_done_twice() -> None:
    gate = Gate({"a": 0})
    request = make_request(8, "a")
    scheduler = make(request, gate=gate)
    plan(scheduler)
    for _ in range(2):
        scheduler.remove(request)
    assert (len(scheduler), scheduler.blocks.num_free, gate.pins[0]) == (0, 100, 0)
    assert (request.slot, request.pinned) == (BASE_SLOT, False)


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_everyone_is_served_in_the_end_however_small_the_cache(budget: int) -> None:
    gate = Gate({"a": 0, "b": 1})
    requests = [make_request(n, name) for n, name in [(3, "a"), (12, None), (7, "b"), (1, "a"), (9, "b")]]
    scheduler = make(*requests, gate=gate, blocks=4, budget=budget)
    for _ in range(2000):
        advance(plan(scheduler))
        for request in list(scheduler):
            if request.num_generated >= 3:
                scheduler.remove(request)
        if not len(scheduler):
            break
    assert [request.num_generated >= 3 for request in requests] == [True] * 5
    assert scheduler.blocks.num_free == 4
    assert not +gate.pins


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.sampled_from([None, "a", "b", "c"])),
        st.tuples(st.just("mix"), st.integers(1, 30), st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=2)),
        st.tuples(st.just("remove"), st.integers(0, 20)),
        st.tuples(st.just("load"), st.sampled_from("abc")),
        st.tuples(st.just("evict"), st.sampled_from("abc")),
        st.tuples(st.just("break"), st.sampled_from("abc")),
        st.tuples(st.just("leave"), st.integers(0, 2)),
        st.tuples(st.just("step")),
        st.tuples(st.just("step")),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(MOVES, st.integers(1, 8), st.integers(1, 4), st.integers(1, 5), st.integers(1, 20))
def test_blocks_and_pins_are_conserved_whatever_happens(
    moves: list[tuple[object, ...]], blocks: int, size: int, seats: int, budget: int
) -> None:
    gate = Gate()
    scheduler = make(gate=gate, blocks=blocks, size=size, seats=seats, budget=budget)
    for move in moves:
        match move:
            case ("add", int(tokens), name):
                scheduler.add(make_request(tokens, name))  # type: ignore[arg-type]
            case ("mix", int(tokens), [*names]):
                scheduler.add(make_request(tokens, *names))
            case ("remove", int(place)) if len(scheduler):
                scheduler.remove(list(scheduler)[place % len(scheduler)])
            case ("load", str(name)):
                gate.slots[name] = "abc".index(name)
            case ("evict", str(name)) if name in gate.slots and not gate.pins[gate.slots[name]]:
                del gate.slots[name]
            case ("leave", int(slot)):
                gate.late = [slot]
            case ("break", str(name)) if name not in gate.slots:
                gate.broken.append(name)
            case ("step",):
                chunks, failed = scheduler.plan()
                check_plan(scheduler, chunks, budget)
                advance(chunks)
                for request, _ in failed:
                    assert request in scheduler.waiting
                    scheduler.remove(request)
        check_conservation(scheduler, gate)


def check_plan(scheduler: Scheduler, chunks: list[Chunk], budget: int) -> None:
    assert sum(chunk.num_tokens * len(chunk.request.rows) for chunk in chunks) <= budget
    assert len({chunk.request.id for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        request = chunk.request
        assert request in scheduler.running
        assert chunk.num_tokens > 0
        assert chunk.start == request.num_computed
        for row in request.rows:
            assert len(row.blocks) * scheduler.blocks.block_size >= chunk.start + chunk.num_tokens
            assert row.pinned == (row.digest is not None)
            assert (row.slot == BASE_SLOT) == (row.digest is None)


def check_conservation(scheduler: Scheduler, gate: Gate) -> None:
    rows = [row for request in scheduler for row in request.rows]
    held = [block for row in rows for block in row.blocks]
    assert sorted([*held, *scheduler.blocks._free]) == list(range(scheduler.blocks.num_blocks))
    assert all(not row.blocks for request in scheduler.waiting for row in request.rows)
    assert sum(len(request.rows) for request in scheduler.running) <= scheduler._max_num_seqs
    assert +gate.pins == Counter(row.slot for row in rows if row.pinned)
