"""A request alone ≡ the same request among other tenants, whatever happens to them; by either decoder.

Tolerance: native, none. Through torch, logits of a float32 base agree to 1e-5 of the largest logit. The rest is the
order of additions inside a matrix product, which depends on the number of rows. Greedy tokens are equal.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deltaserve.errors import DeltaLoadFailed, ModelNotFound
from deltaserve_kernels.native.parts import Part

from .rig import Rig, make_request
from .town import CODECS, PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltaserve.engine.types import Request

    from .town import Town


@pytest.fixture
def alone(make_town: Callable[..., Town]) -> dict[str | None, tuple[list[int], torch.Tensor]]:
    """Tokens and logits of each tenant and the base, one at a time in an otherwise empty server."""
    town = make_town()
    found: dict[str | None, tuple[list[int], torch.Tensor]] = {}
    for name in (None, *CODECS):
        request = town.ask(name)
        town.run(request)
        found[name] = (town.answer(request), town.logits(request))
    assert len({tuple(tokens) for tokens, _ in found.values()}) > 2  # the tenants do differ
    return found


def check(town: Rig, request: Request, expected: tuple[list[int], torch.Tensor]) -> None:
    tokens, logits = expected
    assert town.answer(request) == tokens
    found = town.logits(request)
    assert found.shape == logits.shape
    if town.model.runtime["decoder"] == "native":
        assert torch.equal(found, logits)
    else:
        assert float((found - logits).abs().max()) <= 1e-5 * float(logits.abs().max())


@pytest.mark.parametrize("budget", [5, 24, 256])
@pytest.mark.parametrize("max_deltas", [1, 2, 4])
def test_alone_is_the_same_as_among_all_others(
    make_town: Callable[..., Town], alone: Any, budget: int, max_deltas: int
) -> None:
    """With fewer slots than tenants, each is evicted and loaded again between the two rounds."""
    town = make_town(max_deltas=max_deltas, budget=budget)
    for _ in range(2):
        requests = {name: town.ask(name) for name in (*CODECS, None)}
        town.run(*requests.values())
        for name, request in requests.items():
            check(town, request, alone[name])


def test_a_preempted_neighbour_changes_nothing(make_town: Callable[..., Town], alone: Any) -> None:
    town = make_town(num_blocks=9)
    for name in CODECS:  # all on the device, so that all start at once and compete for blocks
        town.run(town.ask(name, max_tokens=1))
    requests = {name: town.ask(name) for name in (*CODECS, None)}
    town.run(*requests.values())
    assert town.scheduler.num_preemptions > 0
    for name, request in requests.items():
        check(town, request, alone[name])


def test_a_cancelled_neighbour_changes_nothing(make_town: Callable[..., Town], alone: Any) -> None:
    town = make_town()
    gone, stays = town.ask("svd", max_tokens=50), town.ask("sign")
    for request in (gone, stays):
        town.scheduler.add(request)
    while stays.num_generated < 2:
        town.ready.clear()
        if not town.step():
            assert town.ready.wait(20)
    town.scheduler.remove(gone)
    town.run()
    check(town, stays, alone["sign"])


def test_a_new_version_serves_new_requests_and_the_running_one_keeps_its_own(
    make_town: Callable[..., Town], artifacts: dict[str, bytes], alone: Any
) -> None:
    town = make_town(max_deltas=2)
    old = town.store.lease(town.me, "sign")[1]
    running = town.ask("sign")
    town.scheduler.add(running)
    while running.num_generated < 2:
        town.ready.clear()
        if not town.step():
            assert town.ready.wait(20)
    town.upload("sign", artifacts["sign-2"])
    new, neighbour = town.ask("sign"), town.ask("svd")
    assert new.digest != old.digest
    town.run(new, neighbour)
    check(town, running, alone["sign"])
    check(town, neighbour, alone["svd"])
    fresh = make_town()
    fresh.upload("sign", artifacts["sign-2"])
    expected = fresh.ask("sign")
    fresh.run(expected)
    check(town, new, (fresh.answer(expected), fresh.logits(expected)))
    town.store.release(old.digest)


def test_blocks_of_another_tenant_show_nothing_even_if_they_are_poisoned(
    make_town: Callable[..., Town], alone: Any
) -> None:
    town = make_town(max_deltas=2)
    for name in CODECS:
        town.run(town.ask("grown", prompt=PROMPT * 3), town.ask(None, prompt=PROMPT * 2))
        town.poison_cache()
        requests = {other: town.ask(other) for other in (name, None)}
        town.run(*requests.values())
        for other, request in requests.items():
            check(town, request, alone[other])


def test_a_longer_poisoned_neighbour_in_the_same_batch_shows_nothing(
    make_town: Callable[..., Town], alone: Any
) -> None:
    """Decoding pads the shorter context: with rows of its own, not with another's."""
    town = make_town()
    poisoned, victim = town.ask(None, prompt=PROMPT * 3, max_tokens=12), town.ask("sign")
    town.scheduler.add(poisoned)
    town.step()
    town.poison_cache()
    town.run(victim)
    assert not bool(torch.stack(town.runner.logits[poisoned.id])[-1].isfinite().any())
    check(town, victim, alone["sign"])


def test_a_slot_that_is_used_again_holds_nothing_of_its_former_tenant(make_town: Callable[..., Town]) -> None:
    town = make_town(max_deltas=1, host=1)
    town.run(town.ask("sparse"))
    former = town.residency.slots[0]
    assert former is not None
    town.run(town.ask("svd"))
    held = town.residency.slots[0]
    assert held is not None

    def addresses(delta: Any) -> set[int]:
        tensors = [override.values for override in delta.overrides.values()]
        tensors += [tensor for layer in delta.layers.values() for term in layer.terms for tensor in _tensors(term)]
        return {tensor.data_ptr() for tensor in tensors}

    assert held is not former
    assert addresses(held).isdisjoint(addresses(former))
    assert held.overrides.keys().isdisjoint({"model.embed_tokens.weight"})


def _tensors(term: Any) -> list[torch.Tensor]:
    if isinstance(term, Part):
        return [*term.tensors.values(), *(_tensors(term.before) if term.before else ())]
    return [
        tensor
        for part in ([term.left, term.right] if hasattr(term, "left") else [term])
        for tensor in part.tensors().values()
    ]


def test_a_former_tenant_with_poisoned_weights_does_not_reach_the_next_one(
    make_town: Callable[..., Town], alone: Any
) -> None:
    town = make_town(max_deltas=1, host=1)
    town.run(town.ask("sign"))
    former = town.residency.slots[0]
    assert former is not None
    for override in former.overrides.values():
        override.values.fill_(torch.nan)
    requests = {name: town.ask(name) for name in ("sparse", "svd", "grown")}
    town.run(*requests.values())
    for name, request in requests.items():
        check(town, request, alone[name])


def test_a_damaged_delta_fails_its_request_and_is_never_served_by_the_base(
    make_town: Callable[..., Town], alone: Any
) -> None:
    town = make_town(max_deltas=2)
    path = town.path("svd")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    bad, good, base = town.ask("svd"), town.ask("sign"), town.ask(None)
    town.run(bad, good, base)
    assert isinstance(town.errors[bad.id], DeltaLoadFailed)
    assert bad.num_generated == 0
    check(town, good, alone["sign"])
    check(town, base, alone[None])


def test_an_unknown_or_deleted_delta_is_an_error_and_never_the_base(make_town: Callable[..., Town]) -> None:
    town = make_town()
    with pytest.raises(ModelNotFound):
        town.ask("nobody")
    late = town.ask("svd")
    unknown = make_request(PROMPT, hashlib.sha256(b"unknown").hexdigest())
    town.store.delete(town.me, "svd")
    town.run(late, unknown)
    for request in (late, unknown):
        assert isinstance(town.errors[request.id], DeltaLoadFailed)
        assert request.num_generated == 0


def test_a_slot_that_was_emptied_under_a_request_stops_the_step(make_town: Callable[..., Town]) -> None:
    town = make_town()
    request = town.ask("sign")
    town.scheduler.add(request)
    while not request.pinned:
        town.ready.clear()
        if not town.step():
            assert town.ready.wait(20)
    held, town.residency.slots[request.slot] = town.residency.slots[request.slot], None
    with pytest.raises(LookupError):
        town.step()
    town.residency.slots[request.slot] = held
    town.scheduler.remove(request)


def test_a_seeded_request_draws_the_same_among_other_tenants(make_town: Callable[..., Town]) -> None:
    town = make_town()
    single = town.ask("sign", temperature=1.0, seed=3)
    town.run(single)
    among = town.ask("sign", temperature=1.0, seed=3)
    town.run(*(town.ask(name, temperature=1.0, seed=i) for i, name in enumerate(CODECS)), among)
    assert town.answer(among) == town.answer(single)


def test_a_flood_of_one_tenant_does_not_keep_another_waiting_for_a_load(make_town: Callable[..., Town]) -> None:
    """The newcomer is let in as soon as its delta is there and a seat is free, though the flood never ends."""
    town = make_town(max_deltas=2)
    town.run(town.ask("svd"), town.ask("sign"))
    victim = town.ask("sign", max_tokens=2)
    steps = 0
    town.scheduler.add(victim)
    while victim.num_generated < 2 and steps < 100:
        if len(town.scheduler) < 6:
            town.scheduler.add(town.ask("svd", max_tokens=3))
        town.step()
        steps += 1
    assert steps <= 10
    for request in list(town.scheduler):
        town.scheduler.remove(request)


@pytest.mark.parametrize("salt", [None, b"salt"], ids=["computed again", "found again"])
def test_deltas_that_take_each_other_the_slot_at_every_step_change_nothing(
    make_town: Callable[..., Town], alone: Any, salt: bytes | None
) -> None:
    """No patience at all: whoever waits gets the slot in the next step, and who had it is put back."""
    town = make_town(max_deltas=1, quantum_s=0.0, max_wait_s=0.0, budget=256, salt=salt)
    for name in CODECS:  # all on the host, so that they compete for the slot from the start
        town.run(town.ask(name, prompt=[1], max_tokens=1))
    requests = {name: town.ask(name) for name in (*CODECS, None)}
    town.run(*requests.values())
    assert town.scheduler.num_preemptions >= 4
    for name, request in requests.items():
        check(town, request, alone[name])


def test_a_delta_that_finds_every_slot_in_use_gets_one_though_its_users_never_end(
    make_town: Callable[..., Town], alone: Any
) -> None:
    town = make_town(max_deltas=1, quantum_s=0.0)
    town.run(town.ask("sign", max_tokens=1), town.ask("svd", max_tokens=1))
    victim = town.ask("sign")
    steps = 0
    town.scheduler.add(town.ask("svd", max_tokens=8))
    town.step()
    town.scheduler.add(victim)
    while victim.num_generated < victim.params.max_tokens:
        if len(town.scheduler) < 6:
            town.scheduler.add(town.ask("svd", max_tokens=8))
        assert town.step()
        steps += 1
        assert steps < 40
    check(town, victim, alone["sign"])
    for request in list(town.scheduler):
        town.scheduler.remove(request)
