"""Which deltas are on the device: least recently used out first, never a pinned one, and a damaged file never."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from deltaserve.deltas.resident import ResidentDelta
from deltaserve.errors import DeltaLoadFailed, StoreUnavailable
from deltaserve.ids import DeltaDigest, Slot

from .shelf import WAIT_S, Shelf, size_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_delta_is_loaded_when_it_is_first_asked_for(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf()
    assert shelf.states()[0] == "disk"
    assert shelf.residency.try_pin(shelf.digests[0]) is None
    slot = shelf.pin(0)
    assert shelf.residency.slots[slot] is not None
    assert shelf.states()[0] == "device"
    assert shelf.num_read == 1


def test_the_least_recently_used_goes_first(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=2)
    shelf.use(0, 1, 0, 2)
    assert shelf.states()[:3] == ["device", "host", "device"]
    shelf.use(3)
    assert shelf.states()[:4] == ["host", "host", "device", "device"]


def test_a_pinned_delta_is_never_evicted_and_keeps_its_slot(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=2)
    slot = shelf.pin(0)
    held = shelf.residency.slots[slot]
    shelf.use(1, 2, 3, 4)
    assert shelf.residency.slots[slot] is held
    assert shelf.pin(0) == slot
    assert shelf.residency.counts()["pinned"] == 1


def test_with_every_slot_pinned_a_newcomer_is_read_ahead_and_waits_on_the_host(
    make_shelf: Callable[..., Shelf],
) -> None:
    shelf = make_shelf(device=2)
    pinned = [shelf.pin(0), shelf.pin(1)]
    for _ in range(5):
        assert shelf.residency.try_pin(shelf.digests[2]) is None
    shelf.wait_for("device", "device", "host")
    for _ in range(5):
        assert shelf.residency.try_pin(shelf.digests[2]) is None
    assert shelf.num_read == 3
    shelf.residency.unpin(pinned[0])
    assert shelf.residency.try_pin(shelf.digests[2]) == pinned[0]


def test_what_left_the_device_comes_back_from_the_host(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1)
    shelf.use(0, 1, 0)
    assert shelf.num_read == 2


def test_the_host_keeps_as_many_as_it_may(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1, host=2)
    shelf.use(0, 1, 2, 3)
    assert shelf.states()[:4] == ["disk", "disk", "host", "device"]
    assert shelf.residency.counts() == {"device": 1, "host": 2, "pinned": 0}


def test_bytes_limit_the_device_and_the_host(make_shelf: Callable[..., Shelf], shelf: dict[DeltaDigest, Path]) -> None:
    size = size_of(shelf)
    limited = make_shelf(device=4, device_bytes=2 * size, host_bytes=3 * size)
    limited.use(0, 1, 2, 3, 4)
    assert limited.states() == ["disk", "disk", "host", "device", "device"]
    assert limited.residency.tier_bytes() == {"device": 2 * size, "host": 3 * size}


def test_bytes_of_pinned_deltas_are_not_freed_for_a_newcomer(
    make_shelf: Callable[..., Shelf], shelf: dict[DeltaDigest, Path]
) -> None:
    limited = make_shelf(device=4, device_bytes=size_of(shelf) + 1)
    slot = limited.pin(0)
    assert limited.residency.try_pin(limited.digests[1]) is None
    assert limited.ready.acquire(timeout=WAIT_S)
    assert limited.states()[:2] == ["device", "host"]
    assert [limited.residency.try_pin(limited.digests[1]) for _ in range(3)] == [None] * 3
    assert not limited.ready.acquire(timeout=0.1), "it must not be loaded again and again while there is no room"
    limited.residency.unpin(slot)
    assert limited.residency.try_pin(limited.digests[1]) is not None
    assert limited.states()[:2] == ["host", "device"]


def test_a_delta_larger_than_the_limit_is_served_alone(make_shelf: Callable[..., Shelf]) -> None:
    limited = make_shelf(device=4, device_bytes=1, host_bytes=1)
    limited.use(0, 1)
    assert limited.states()[:2] == ["host", "device"] or limited.states()[:2] == ["disk", "device"]


def test_bytes_and_counts_are_those_of_the_tensors(
    make_shelf: Callable[..., Shelf], shelf: dict[DeltaDigest, Path]
) -> None:
    size, residency = size_of(shelf), (one := make_shelf()).residency
    assert residency.resident_bytes(one.digests[0]) is None
    one.use(0, 1, 2)
    assert residency.tier_bytes() == {"device": 2 * size, "host": 3 * size}
    assert residency.resident_bytes(one.digests[0]) == residency.resident_bytes(one.digests[2]) == size
    held = [delta for delta in residency.slots if delta is not None]
    tensors = [t for d in held for layer in d.layers.values() for term in layer.terms for t in term.tensors().values()]
    tensors += [t for d in held for o in d.overrides.values() for t in (o.values, o.rows) if t is not None]
    assert sum(tensor.nbytes for tensor in tensors) == 2 * size


def test_a_failed_load_is_told_once_and_then_tried_again(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf()
    good = shelf.files[shelf.digests[0]]
    shelf.files[shelf.digests[0]] = good.with_name("gone")
    assert shelf.residency.try_pin(shelf.digests[0]) is None
    assert shelf.ready.acquire(timeout=WAIT_S)
    with pytest.raises(DeltaLoadFailed):
        shelf.residency.try_pin(shelf.digests[0])
    shelf.files[shelf.digests[0]] = good
    assert shelf.residency.slots[shelf.pin(0)] is not None


def test_a_store_that_cannot_be_reached_is_no_fault_of_the_delta(
    make_shelf: Callable[..., Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = make_shelf()

    def unreachable(digest: DeltaDigest) -> Path:
        raise StoreUnavailable(f"no answer for {digest[:12]}")

    with monkeypatch.context() as patch:
        patch.setattr(shelf, "_path", unreachable)
        assert shelf.residency.try_pin(shelf.digests[0]) is None
        assert shelf.ready.acquire(timeout=WAIT_S)
        with pytest.raises(StoreUnavailable):
            shelf.residency.try_pin(shelf.digests[0])
    assert shelf.residency.slots[shelf.pin(0)] is not None


def test_a_failure_is_told_to_those_who_waited_and_to_nobody_after_them(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf()
    path = shelf.files.pop(shelf.digests[0])
    shelf.want(0)
    assert shelf.ready.acquire(timeout=WAIT_S)
    shelf.want(0)  # the next step's turns, with the same request
    with pytest.raises(DeltaLoadFailed):
        shelf.pin(0)
    shelf.use(1)  # nobody waits for 0: it is not tried beside this
    shelf.residency.prewarm(shelf.digests[0])
    assert shelf.ready.acquire(timeout=WAIT_S)
    shelf.files[shelf.digests[0]] = path  # the same bytes, sent again
    shelf.use(0)


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_a_damaged_file_is_known_by_its_digest(make_shelf: Callable[..., Shelf], tmp_path: Path, damage: str) -> None:
    shelf = make_shelf()
    raw = bytearray(shelf.files[shelf.digests[0]].read_bytes())
    if damage == "flip":
        raw[-10] ^= 1
    elif damage == "cut":
        del raw[-4:]
    else:
        raw = bytearray(shelf.files[shelf.digests[1]].read_bytes())
    shelf.files[shelf.digests[0]] = tmp_path / "damaged"
    (tmp_path / "damaged").write_bytes(raw)
    with pytest.raises(DeltaLoadFailed, match="damaged"):
        shelf.pin(0)
    assert shelf.residency.counts() == {"device": 0, "host": 0, "pinned": 0}
    shelf.use(1)


def test_the_file_may_go_once_a_delta_is_loaded(make_shelf: Callable[..., Shelf], tmp_path: Path) -> None:
    shelf = make_shelf()
    copy = tmp_path / "copy"
    copy.write_bytes(shelf.files[shelf.digests[0]].read_bytes())
    shelf.files[shelf.digests[0]] = copy
    delta = shelf.residency.slots[shelf.pin(0)]
    assert delta is not None
    before = {name: layer.terms[0].decode() for name, layer in delta.layers.items()}
    copy.write_bytes(bytes(copy.stat().st_size))
    copy.unlink()
    assert all(torch.equal(layer.terms[0].decode(), before[name]) for name, layer in delta.layers.items())


def test_discarding_frees_what_is_not_in_use(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf()
    slot = shelf.pin(0)
    shelf.use(1)
    shelf.residency.discard(shelf.digests)
    assert shelf.states()[:2] == ["device", "disk"]
    assert shelf.residency.slots[slot] is not None
    assert shelf.residency.slots[1 - slot] is None
    shelf.residency.unpin(slot)
    shelf.residency.discard(shelf.digests)
    assert shelf.residency.counts() == {"device": 0, "host": 0, "pinned": 0}


def test_unpinning_more_often_than_pinning_is_a_bug(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf()
    shelf.use(0)
    with pytest.raises(AssertionError):
        shelf.residency.unpin(Slot(0))


def test_many_threads_never_see_a_pinned_slot_change(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=2, host=3)
    problems: list[str] = []
    served = [0] * 4

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(400):
            digest = chance.choice(shelf.digests)
            slot = shelf.residency.try_pin(digest)
            if slot is None:
                shelf.ready.acquire(timeout=0.001)
                continue
            held = shelf.residency.slots[slot]
            if shelf.residency.state(digest) != "device" or held is None:
                problems.append("a pinned delta is not there")
            if seed == 0 and chance.random() < 0.1:
                shelf.residency.discard([digest])
            if shelf.residency.slots[slot] is not held:
                problems.append("a pinned slot changed")
            counts = shelf.residency.counts()
            if counts["device"] > 2 or counts["host"] > 3 or not 1 <= counts["pinned"] <= 2:
                problems.append(f"{counts}")
            served[seed] += 1
            shelf.residency.unpin(slot)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert problems == []
    assert sum(served) > 0
    assert shelf.residency.counts()["pinned"] == 0
    shelf.residency.close()
    held = [delta for delta in shelf.residency.slots if delta is not None]
    assert len(held) == shelf.residency.counts()["device"]


def test_another_device_is_reached_by_a_copy_that_nobody_waits_for(make_shelf: Callable[..., Shelf]) -> None:
    shelf = make_shelf(device=1, kind="meta")
    shelf.use(0, 1, 0)
    assert shelf.moves == ["disk", "host", "disk", "host", "host"]
    held = shelf.residency.slots[0]
    assert held is not None
    assert {t.device.type for layer in held.layers.values() for t in layer.terms[0].tensors().values()} == {"meta"}


def test_a_copy_that_fails_is_told_and_frees_its_slot(
    make_shelf: Callable[..., Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = make_shelf(device=1, kind="meta")

    def full(*given: object) -> ResidentDelta:  # noqa: ARG001
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(DeltaLoadFailed, match="OutOfMemoryError"):
        patch.setattr(ResidentDelta, "to", full)
        shelf.pin(0)
    assert shelf.residency.counts() == {"device": 0, "host": 1, "pinned": 0}
    shelf.use(1, 0)
