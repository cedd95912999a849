"""Whose turn it is on the device: what waits is read in turn, places change hands, and some deltas are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltaserve.errors import BadRequest, DeltaLoadFailed
from deltaserve.ids import DeltaDigest

from .shelf import Shelf, size_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_what_is_wanted_is_read_in_turn_and_as_far_as_the_host_holds_it(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1, host=3)
    slot = shelf.pin(0)
    shelf.want(3, 1, 2, 4)
    shelf.wait_for("device", "host", "disk", "host", "disk")
    assert shelf.reads == [shelf.digests[place] for place in (0, 3, 1, 2)][: shelf.num_read]
    assert shelf.num_read >= 3
    shelf.residency.unpin(slot)
    assert shelf.states()[3] == "device"


def test_a_change_of_turns_is_read_first(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1)
    shelf.pin(0)
    shelf.disk.clear()
    shelf.want(1, 2, 3)
    shelf.want(4, 1)
    shelf.disk.set()
    shelf.wait_for("device", "host", "disk", "disk", "host")
    assert shelf.reads[2:] == [shelf.digests[4]], "what was being read is read to its end, what is not wanted is not"


def test_the_host_lets_go_of_what_nobody_waits_for_and_then_of_the_last_in_turn(
    make_shelf: Callable[..., Shelf],
) -> None:
    shelf = make_shelf(device=1, host=2)
    shelf.use(0, 1)
    slot = shelf.pin(1)
    shelf.want(2)
    shelf.wait_for("disk", "device", "host")
    shelf.want(3, 2)
    shelf.wait_for("disk", "device", "host", "host")
    shelf.want(3, 2, 4)
    assert shelf.num_read == 4, "there is no room on the host for a third that waits"
    shelf.residency.unpin(slot)


def test_what_costs_more_to_bring_for_its_size_stays_longer(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1, host=3)
    shelf.use(0, 1, 2)
    shelf.residency._costs.update({("disk", shelf.digests[n]): cost for n, cost in enumerate([5.0, 1.0, 1.0])})
    for which in (0, 1, 2):
        shelf.use(which)
    shelf.use(3)
    assert shelf.states() == ["host", "disk", "host", "device", "disk"]


def test_a_slot_in_use_is_closed_after_its_quantum_and_changes_hands_when_it_is_left(
    make_shelf: Callable[..., Shelf],
) -> None:
    shelf = make_shelf(device=2, quantum_s=5.0)
    first, second = shelf.pin(0), shelf.pin(1)
    shelf.want(2)
    shelf.wait_for("device", "device", "host")
    shelf.now = 4.0
    shelf.want(2)
    assert shelf.pin(0) == first, "until then it is open"
    shelf.now = 5.0
    shelf.want(2)
    assert shelf.residency.try_pin(shelf.digests[0]) is None, "no new request gets in"
    assert shelf.pin(1) == second, "one slot is enough"
    shelf.residency.unpin(first)
    assert shelf.states()[2] == "host"
    shelf.residency.unpin(first)
    assert shelf.states()[:3] == ["host", "device", "device"]
    assert shelf.pin(2) == first


def test_a_slot_is_open_again_when_nobody_waits_any_more(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1, quantum_s=1.0)
    slot = shelf.pin(0)
    shelf.want(1)
    shelf.wait_for("device", "host")
    shelf.now = 2.0
    shelf.want(1)
    assert shelf.residency.try_pin(shelf.digests[0]) is None
    shelf.want()
    assert shelf.pin(0) == slot


def test_nobody_overtakes_the_first_that_waits_for_a_slot(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1)
    slot = shelf.pin(0)
    shelf.want(1, 2)
    shelf.wait_for("device", "host", "host")
    shelf.residency.unpin(slot)
    assert shelf.residency.try_pin(shelf.digests[2]) is None
    assert shelf.pin(1) == slot


def test_a_delta_that_is_waited_for_keeps_its_slot_for_a_quantum_though_unused(
    make_shelf: Callable[..., Shelf],
) -> None:
    shelf = make_shelf(device=1, quantum_s=5.0)
    shelf.use(0)
    shelf.want(1, 0)
    shelf.wait_for("device", "host")
    shelf.now = 4.0
    shelf.want(1, 0)
    assert shelf.states()[0] == "device"
    shelf.now = 5.0
    shelf.want(1, 0)
    assert shelf.states()[:2] == ["host", "device"]


def test_what_waits_beside_slots_that_it_holds_takes_the_one_that_nobody_uses_at_once(
    make_shelf: Callable[..., Shelf],
) -> None:
    shelf = make_shelf(device=2, quantum_s=5.0)
    shelf.pin(0)
    shelf.use(1)
    shelf.want(2, 1, held=[0])
    shelf.wait_for("device", "host", "device")


def test_a_slot_is_not_closed_for_the_one_that_holds_it_nor_for_a_later_one(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=3, quantum_s=1.0)
    for one in (0, 1, 2):
        shelf.pin(one)
    shelf.want(3)
    shelf.wait_for("device", "device", "device", "host")
    shelf.now = 2.0
    shelf.want(1, 3, held=[0])
    assert shelf.residency.try_pin(shelf.digests[2]) is None, "the only one that may close"
    assert [shelf.residency.is_ready(shelf.digests[one]) for one in range(4)] == [True, True, False, False]


def test_after_the_longest_wait_a_slot_is_to_be_left(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=2, quantum_s=1.0, max_wait_s=10.0)
    slot = shelf.pin(0)
    shelf.now = 6.0
    later = shelf.pin(1)
    shelf.want(2)
    shelf.wait_for("device", "device", "host")
    for now, left in [(9.0, []), (15.9, []), (16.0, [slot])]:
        shelf.now = now
        shelf.want(2)
        assert shelf.residency.overdue() == left
    shelf.residency.unpin(slot)
    assert shelf.states()[:3] == ["host", "device", "device"]
    assert shelf.residency.overdue() == []
    assert slot != later


def test_what_is_kept_is_loaded_and_stays_until_it_is_let_go(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=2)
    shelf.residency.keep(shelf.digests[0])
    shelf.wait_for("device")
    shelf.use(1, 2, 3)
    assert shelf.states() == ["device", "host", "host", "device", "disk"]
    shelf.pin(3)
    assert shelf.residency.try_pin(shelf.digests[1]) is None
    shelf.now = 1e6
    shelf.want(1)
    assert shelf.residency.try_pin(shelf.digests[0]) is not None, "it is never closed"
    shelf.residency.unpin(shelf.residency._slot_of[shelf.digests[0]])
    shelf.residency.let_go(shelf.digests[0])
    assert shelf.states()[:2] == ["host", "device"]


def test_a_prewarmed_delta_is_there_before_it_is_asked_for(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=2)
    shelf.residency.prewarm(shelf.digests[0])
    shelf.wait_for("device")
    shelf.residency.prewarm(shelf.digests[0])
    assert shelf.residency.try_pin(shelf.digests[0]) is not None
    assert shelf.num_read == 1


def test_a_prewarmed_delta_takes_nobodys_slot(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1)
    slot = shelf.pin(0)
    shelf.residency.prewarm(shelf.digests[1])
    shelf.wait_for("device", "host")
    shelf.now = 1e6
    shelf.want()
    assert shelf.residency.overdue() == []
    assert shelf.pin(0) == slot


def test_one_slot_stays_free_of_what_is_kept(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=2)
    shelf.residency.keep(shelf.digests[0])
    shelf.residency.keep(shelf.digests[0])
    with pytest.raises(BadRequest, match="one of its slots must stay free"):
        shelf.residency.keep(shelf.digests[1])


def test_what_cannot_fit_beside_what_is_kept_fails(
    make_shelf: Callable[..., Shelf], shelf: dict[DeltaDigest, Path]
) -> None:
    limited = make_shelf(device=4, device_bytes=size_of(shelf) + 1)
    limited.residency.keep(limited.digests[0])
    limited.wait_for("device")
    with pytest.raises(DeltaLoadFailed, match="does not fit beside those that are kept"):
        limited.pin(1)
