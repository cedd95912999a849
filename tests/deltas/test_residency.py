"""Which deltas are on the device: least recently used out first, never a pinned one, and a damaged file never."""

from __future__ import annotations

import hashlib
import random
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.deltas.artifact import Artifact
from deltaserve.deltas.limits import Limits
from deltaserve.deltas.residency import Residency
from deltaserve.deltas.resident import ResidentDelta
from deltaserve.errors import BadRequest, DeltaLoadFailed, StoreUnavailable
from deltaserve.ids import DeltaDigest, Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

WAIT_S = 20.0
NUM = 5


@pytest.fixture(scope="module")
def shelf(
    tiny_base: Path, make_finetune: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[DeltaDigest, Path]:
    """A few artifacts by digest."""
    from deltaserve.codecs.registry import make_codec
    from deltaserve.deltas.checkpoint import Checkpoint
    from deltaserve.deltas.compress import compress

    folder = tmp_path_factory.mktemp("shelf")
    tuned = make_finetune(tiny_base, folder / "tuned", scale=0.02, seed=1, embedding_rows=(3,))
    found: dict[DeltaDigest, Path] = {}
    for seed in range(NUM):
        path = folder / f"{seed}.safetensors"
        compress(Checkpoint.open(tiny_base), Checkpoint.open(tuned), make_codec("bitdelta"), path, seed=seed)
        found[DeltaDigest(hashlib.sha256(path.read_bytes()).hexdigest())] = path
    assert len(found) == NUM
    return found


class Shelf:
    """A residency and the files it reads."""

    def __init__(
        self, files: dict[DeltaDigest, Path], device: int = 2, host: int = 8, kind: str = "cpu", **limits: Any
    ) -> None:
        self.files = dict(files)
        self.digests = list(files)
        self.reads: list[DeltaDigest] = []
        self.ready = threading.Semaphore(0)
        self.disk = threading.Event()  # reads wait while it is clear
        self.disk.set()
        self.now = 0.0
        self.moves: list[str] = []
        self.residency = Residency(
            lambda digest: nullcontext(self._path(digest)),
            torch.device(kind),
            Limits(device, host, **limits),
            on_ready=self.ready.release,
            on_loaded=lambda tier, seconds: self.moves.append(tier),
            clock=lambda: self.now,
        )

    def _path(self, digest: DeltaDigest) -> Path:
        self.reads.append(digest)
        assert self.disk.wait(WAIT_S)
        return self.files[digest]

    @property
    def num_read(self) -> int:
        return len(self.reads)

    def wait_for(self, *states: str) -> None:
        """Until the first deltas are in these states."""
        while self.states()[: len(states)] != list(states):
            assert self.ready.acquire(timeout=WAIT_S), f"{self.states()}, not {states}"

    def want(self, *which: int, held: Sequence[int] = ()) -> None:
        self.residency.want([self.digests[one] for one in which], [self.digests[one] for one in held])

    def pin(self, which: int) -> Slot:
        """Pinned, loaded first where it must be."""
        for _ in range(6):
            slot = self.residency.try_pin(self.digests[which])
            if slot is not None:
                return slot
            assert self.ready.acquire(timeout=WAIT_S)
        raise AssertionError("it does not come")

    def use(self, *which: int) -> None:
        for one in which:
            self.residency.unpin(self.pin(one))

    def states(self) -> list[str]:
        return [self.residency.state(digest) for digest in self.digests]


@pytest.fixture
def make(shelf: dict[DeltaDigest, Path]) -> Iterator[Callable[..., Shelf]]:
    made: list[Shelf] = []

    def build(**options: Any) -> Shelf:
        made.append(Shelf(shelf, **options))
        return made[-1]

    yield build
    for one in made:
        one.residency.close()


def size_of(shelf: dict[DeltaDigest, Path]) -> int:
    return Artifact.open(next(iter(shelf.values()))).resident_bytes


def test_a_delta_is_loaded_when_it_is_first_asked_for(make: Callable[..., Shelf]) -> None:
    shelf = make()
    assert shelf.states()[0] == "disk"
    assert shelf.residency.try_pin(shelf.digests[0]) is None
    slot = shelf.pin(0)
    assert shelf.residency.slots[slot] is not None
    assert shelf.states()[0] == "device"
    assert shelf.num_read == 1


def test_the_least_recently_used_goes_first(make: Callable[..., Shelf]) -> None:
    shelf = make(device=2)
    shelf.use(0, 1, 0, 2)
    assert shelf.states()[:3] == ["device", "host", "device"]
    shelf.use(3)
    assert shelf.states()[:4] == ["host", "host", "device", "device"]


def test_a_pinned_delta_is_never_evicted_and_keeps_its_slot(make: Callable[..., Shelf]) -> None:
    shelf = make(device=2)
    slot = shelf.pin(0)
    held = shelf.residency.slots[slot]
    shelf.use(1, 2, 3, 4)
    assert shelf.residency.slots[slot] is held
    assert shelf.pin(0) == slot
    assert shelf.residency.counts()["pinned"] == 1


def test_with_every_slot_pinned_a_newcomer_is_read_ahead_and_waits_on_the_host(make: Callable[..., Shelf]) -> None:
    shelf = make(device=2)
    pinned = [shelf.pin(0), shelf.pin(1)]
    for _ in range(5):
        assert shelf.residency.try_pin(shelf.digests[2]) is None
    shelf.wait_for("device", "device", "host")
    for _ in range(5):
        assert shelf.residency.try_pin(shelf.digests[2]) is None
    assert shelf.num_read == 3
    shelf.residency.unpin(pinned[0])
    assert shelf.residency.try_pin(shelf.digests[2]) == pinned[0]


def test_what_left_the_device_comes_back_from_the_host(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1)
    shelf.use(0, 1, 0)
    assert shelf.num_read == 2


def test_the_host_keeps_as_many_as_it_may(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1, host=2)
    shelf.use(0, 1, 2, 3)
    assert shelf.states()[:4] == ["disk", "disk", "host", "device"]
    assert shelf.residency.counts() == {"device": 1, "host": 2, "pinned": 0}


def test_bytes_limit_the_device_and_the_host(make: Callable[..., Shelf], shelf: dict[DeltaDigest, Path]) -> None:
    size = size_of(shelf)
    limited = make(device=4, device_bytes=2 * size, host_bytes=3 * size)
    limited.use(0, 1, 2, 3, 4)
    assert limited.states() == ["disk", "disk", "host", "device", "device"]
    assert limited.residency.tier_bytes() == {"device": 2 * size, "host": 3 * size}


def test_bytes_of_pinned_deltas_are_not_freed_for_a_newcomer(
    make: Callable[..., Shelf], shelf: dict[DeltaDigest, Path]
) -> None:
    limited = make(device=4, device_bytes=size_of(shelf) + 1)
    slot = limited.pin(0)
    assert limited.residency.try_pin(limited.digests[1]) is None
    assert limited.ready.acquire(timeout=WAIT_S)
    assert limited.states()[:2] == ["device", "host"]
    assert [limited.residency.try_pin(limited.digests[1]) for _ in range(3)] == [None] * 3
    assert not limited.ready.acquire(timeout=0.1), "it must not be loaded again and again while there is no room"
    limited.residency.unpin(slot)
    assert limited.residency.try_pin(limited.digests[1]) is not None
    assert limited.states()[:2] == ["host", "device"]


def test_a_delta_larger_than_the_limit_is_served_alone(make: Callable[..., Shelf]) -> None:
    limited = make(device=4, device_bytes=1, host_bytes=1)
    limited.use(0, 1)
    assert limited.states()[:2] == ["host", "device"] or limited.states()[:2] == ["disk", "device"]


def test_bytes_and_counts_are_those_of_the_tensors(make: Callable[..., Shelf], shelf: dict[DeltaDigest, Path]) -> None:
    size, residency = size_of(shelf), (one := make()).residency
    assert residency.resident_bytes(one.digests[0]) is None
    one.use(0, 1, 2)
    assert residency.tier_bytes() == {"device": 2 * size, "host": 3 * size}
    assert residency.resident_bytes(one.digests[0]) == residency.resident_bytes(one.digests[2]) == size
    held = [delta for delta in residency.slots if delta is not None]
    tensors = [t for d in held for layer in d.layers.values() for term in layer.terms for t in term.tensors().values()]
    tensors += [t for d in held for o in d.overrides.values() for t in (o.values, o.rows) if t is not None]
    assert sum(tensor.nbytes for tensor in tensors) == 2 * size


def test_a_failed_load_is_told_once_and_then_tried_again(make: Callable[..., Shelf]) -> None:
    shelf = make()
    good = shelf.files[shelf.digests[0]]
    shelf.files[shelf.digests[0]] = good.with_name("gone")
    assert shelf.residency.try_pin(shelf.digests[0]) is None
    assert shelf.ready.acquire(timeout=WAIT_S)
    with pytest.raises(DeltaLoadFailed):
        shelf.residency.try_pin(shelf.digests[0])
    shelf.files[shelf.digests[0]] = good
    assert shelf.residency.slots[shelf.pin(0)] is not None


def test_a_store_that_cannot_be_reached_is_no_fault_of_the_delta(
    make: Callable[..., Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = make()

    def unreachable(digest: DeltaDigest) -> Path:
        raise StoreUnavailable(f"no answer for {digest[:12]}")

    with monkeypatch.context() as patch:
        patch.setattr(shelf, "_path", unreachable)
        assert shelf.residency.try_pin(shelf.digests[0]) is None
        assert shelf.ready.acquire(timeout=WAIT_S)
        with pytest.raises(StoreUnavailable):
            shelf.residency.try_pin(shelf.digests[0])
    assert shelf.residency.slots[shelf.pin(0)] is not None


def test_a_failure_is_told_to_those_who_waited_and_to_nobody_after_them(make: Callable[..., Shelf]) -> None:
    shelf = make()
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
def test_a_damaged_file_is_known_by_its_digest(make: Callable[..., Shelf], tmp_path: Path, damage: str) -> None:
    shelf = make()
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


def test_the_file_may_go_once_a_delta_is_loaded(make: Callable[..., Shelf], tmp_path: Path) -> None:
    shelf = make()
    copy = tmp_path / "copy"
    copy.write_bytes(shelf.files[shelf.digests[0]].read_bytes())
    shelf.files[shelf.digests[0]] = copy
    delta = shelf.residency.slots[shelf.pin(0)]
    assert delta is not None
    before = {name: layer.terms[0].decode() for name, layer in delta.layers.items()}
    copy.write_bytes(bytes(copy.stat().st_size))
    copy.unlink()
    assert all(torch.equal(layer.terms[0].decode(), before[name]) for name, layer in delta.layers.items())


def test_discarding_frees_what_is_not_in_use(make: Callable[..., Shelf]) -> None:
    shelf = make()
    slot = shelf.pin(0)
    shelf.use(1)
    shelf.residency.discard(shelf.digests)
    assert shelf.states()[:2] == ["device", "disk"]
    assert shelf.residency.slots[slot] is not None
    assert shelf.residency.slots[1 - slot] is None
    shelf.residency.unpin(slot)
    shelf.residency.discard(shelf.digests)
    assert shelf.residency.counts() == {"device": 0, "host": 0, "pinned": 0}


def test_unpinning_more_often_than_pinning_is_a_bug(make: Callable[..., Shelf]) -> None:
    shelf = make()
    shelf.use(0)
    with pytest.raises(AssertionError):
        shelf.residency.unpin(Slot(0))


def test_many_threads_never_see_a_pinned_slot_change(make: Callable[..., Shelf]) -> None:
    shelf = make(device=2, host=3)
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


def test_what_is_wanted_is_read_in_turn_and_as_far_as_the_host_holds_it(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1, host=3)
    slot = shelf.pin(0)
    shelf.want(3, 1, 2, 4)
    shelf.wait_for("device", "host", "disk", "host", "disk")
    assert shelf.reads == [shelf.digests[place] for place in (0, 3, 1, 2)][: shelf.num_read]
    assert shelf.num_read >= 3
    shelf.residency.unpin(slot)
    assert shelf.states()[3] == "device"


def test_a_change_of_turns_is_read_first(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1)
    shelf.pin(0)
    shelf.disk.clear()
    shelf.want(1, 2, 3)
    shelf.want(4, 1)
    shelf.disk.set()
    shelf.wait_for("device", "host", "disk", "disk", "host")
    assert shelf.reads[2:] == [shelf.digests[4]], "what was being read is read to its end, what is not wanted is not"


def test_the_host_lets_go_of_what_nobody_waits_for_and_then_of_the_last_in_turn(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1, host=2)
    shelf.use(0, 1)
    slot = shelf.pin(1)
    shelf.want(2)
    shelf.wait_for("disk", "device", "host")
    shelf.want(3, 2)
    shelf.wait_for("disk", "device", "host", "host")
    shelf.want(3, 2, 4)
    assert shelf.num_read == 4, "there is no room on the host for a third that waits"
    shelf.residency.unpin(slot)


def test_what_costs_more_to_bring_for_its_size_stays_longer(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1, host=3)
    shelf.use(0, 1, 2)
    shelf.residency._costs.update({("disk", shelf.digests[n]): cost for n, cost in enumerate([5.0, 1.0, 1.0])})
    for which in (0, 1, 2):
        shelf.use(which)
    shelf.use(3)
    assert shelf.states() == ["host", "disk", "host", "device", "disk"]


def test_a_slot_in_use_is_closed_after_its_quantum_and_changes_hands_when_it_is_left(
    make: Callable[..., Shelf],
) -> None:
    shelf = make(device=2, quantum_s=5.0)
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


def test_a_slot_is_open_again_when_nobody_waits_any_more(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1, quantum_s=1.0)
    slot = shelf.pin(0)
    shelf.want(1)
    shelf.wait_for("device", "host")
    shelf.now = 2.0
    shelf.want(1)
    assert shelf.residency.try_pin(shelf.digests[0]) is None
    shelf.want()
    assert shelf.pin(0) == slot


def test_nobody_overtakes_the_first_that_waits_for_a_slot(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1)
    slot = shelf.pin(0)
    shelf.want(1, 2)
    shelf.wait_for("device", "host", "host")
    shelf.residency.unpin(slot)
    assert shelf.residency.try_pin(shelf.digests[2]) is None
    assert shelf.pin(1) == slot


def test_a_delta_that_is_waited_for_keeps_its_slot_for_a_quantum_though_unused(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1, quantum_s=5.0)
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
    make: Callable[..., Shelf],
) -> None:
    shelf = make(device=2, quantum_s=5.0)
    shelf.pin(0)
    shelf.use(1)
    shelf.want(2, 1, held=[0])
    shelf.wait_for("device", "host", "device")


def test_a_slot_is_not_closed_for_the_one_that_holds_it_nor_for_a_later_one(make: Callable[..., Shelf]) -> None:
    shelf = make(device=3, quantum_s=1.0)
    for one in (0, 1, 2):
        shelf.pin(one)
    shelf.want(3)
    shelf.wait_for("device", "device", "device", "host")
    shelf.now = 2.0
    shelf.want(1, 3, held=[0])
    assert shelf.residency.try_pin(shelf.digests[2]) is None, "the only one that may close"
    assert [shelf.residency.is_ready(shelf.digests[one]) for one in range(4)] == [True, True, False, False]


def test_after_the_longest_wait_a_slot_is_to_be_left(make: Callable[..., Shelf]) -> None:
    shelf = make(device=2, quantum_s=1.0, max_wait_s=10.0)
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


def test_what_is_kept_is_loaded_and_stays_until_it_is_let_go(make: Callable[..., Shelf]) -> None:
    shelf = make(device=2)
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


def test_a_prewarmed_delta_is_there_before_it_is_asked_for(make: Callable[..., Shelf]) -> None:
    shelf = make(device=2)
    shelf.residency.prewarm(shelf.digests[0])
    shelf.wait_for("device")
    shelf.residency.prewarm(shelf.digests[0])
    assert shelf.residency.try_pin(shelf.digests[0]) is not None
    assert shelf.num_read == 1


def test_a_prewarmed_delta_takes_nobodys_slot(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1)
    slot = shelf.pin(0)
    shelf.residency.prewarm(shelf.digests[1])
    shelf.wait_for("device", "host")
    shelf.now = 1e6
    shelf.want()
    assert shelf.residency.overdue() == []
    assert shelf.pin(0) == slot


def test_one_slot_stays_free_of_what_is_kept(make: Callable[..., Shelf]) -> None:
    shelf = make(device=2)
    shelf.residency.keep(shelf.digests[0])
    shelf.residency.keep(shelf.digests[0])
    with pytest.raises(BadRequest, match="one of its slots must stay free"):
        shelf.residency.keep(shelf.digests[1])


def test_what_cannot_fit_beside_what_is_kept_fails(make: Callable[..., Shelf], shelf: dict[DeltaDigest, Path]) -> None:
    limited = make(device=4, device_bytes=size_of(shelf) + 1)
    limited.residency.keep(limited.digests[0])
    limited.wait_for("device")
    with pytest.raises(DeltaLoadFailed, match="does not fit beside those that are kept"):
        limited.pin(1)


def test_another_device_is_reached_by_a_copy_that_nobody_waits_for(make: Callable[..., Shelf]) -> None:
    shelf = make(device=1, kind="meta")
    shelf.use(0, 1, 0)
    assert shelf.moves == ["disk", "host", "disk", "host", "host"]
    held = shelf.residency.slots[0]
    assert held is not None
    assert {t.device.type for layer in held.layers.values() for t in layer.terms[0].tensors().values()} == {"meta"}


def test_a_copy_that_fails_is_told_and_frees_its_slot(
    make: Callable[..., Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = make(device=1, kind="meta")

    def full(*given: object) -> ResidentDelta:  # noqa: ARG001
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(DeltaLoadFailed, match="OutOfMemoryError"):
        patch.setattr(ResidentDelta, "to", full)
        shelf.pin(0)
    assert shelf.residency.counts() == {"device": 0, "host": 1, "pinned": 0}
    shelf.use(1, 0)
