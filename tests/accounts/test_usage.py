"""What was used is on the bill, once, whatever happens to the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.errors import RegistryUnavailable, StorageFull
from deltaserve.tenants.usage import Usage, Used

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deltaserve.tenants.accounts import Accounts, Tenant
    from deltaserve.tenants.registry import Registry


@pytest.fixture
def usage(registry: Registry, clock: Any) -> Iterator[Usage]:
    made = Usage(registry, clock)
    yield made
    made.close()


def answered(usage: Usage, tenant: Tenant, model: str, prompt: int, completion: int) -> None:
    usage.add(tenant.id, tenant.name, model, requests=1, prompt_tokens=prompt, completion_tokens=completion)


def test_requests_and_tokens_are_summed_by_tenant_model_and_day(usage: Usage, accounts: Accounts, clock: Any) -> None:
    a, b = accounts.create("a", "test"), accounts.create("b", "test")
    answered(usage, a, "m", 10, 1)
    answered(usage, a, "m", 20, 2)
    answered(usage, a, "base", 5, 5)
    answered(usage, b, "m", 1, 1)
    clock.now += 86_400
    answered(usage, a, "m", 100, 0)
    first, second = "2023-11-14", "2023-11-15"
    assert usage.report(a) == [
        Used("a", "base", first, 1, 5, 5),
        Used("a", "m", first, 2, 30, 3),
        Used("a", "m", second, 1, 100, 0),
    ]
    assert usage.report(since=second) == [Used("a", "m", second, 1, 100, 0)]
    assert usage.report(a, second, second) == usage.report(a, since=second)
    assert {used.day for used in usage.report(until="2023-11-14")} == {"2023-11-14"}
    assert len(usage.report()) == 4


def test_cached_tokens_and_seconds_on_the_device_are_on_the_same_line(usage: Usage, accounts: Accounts) -> None:
    a = accounts.create("a", "test")
    answered(usage, a, "m", 10, 1)
    usage.add(a.id, a.name, "m", cached_tokens=8, resident_s=0.25)
    usage.write()
    usage.add(a.id, a.name, "m", resident_s=0.5)
    assert usage.report(a) == [Used("a", "m", "2023-11-14", 1, 10, 1, cached_tokens=8, resident_s=0.75)]


def test_a_restart_keeps_it_and_a_deleted_tenants_stays(registry: Registry, accounts: Accounts, clock: Any) -> None:
    before = Usage(registry, clock)
    tenant = accounts.create("gone", "test")
    answered(before, tenant, "m", 1, 2)
    before.close()
    accounts.delete(tenant, "test")
    after = Usage(registry, clock)
    assert after.report() == [Used("gone", "m", "2023-11-14", 1, 1, 2)]
    after.close()


def test_a_full_disk_loses_nothing_and_counts_nothing_twice(
    usage: Usage, accounts: Accounts, set_writable: Callable[[bool], None]
) -> None:
    set_writable(False)
    answered(usage, accounts.default, "m", 3, 4)
    for _ in range(2):
        with pytest.raises((StorageFull, RegistryUnavailable)):
            usage.write()
    answered(usage, accounts.default, "m", 3, 4)
    set_writable(True)
    assert [(used.requests, used.prompt_tokens) for used in usage.report()] == [(2, 6)]
    assert [(used.requests, used.prompt_tokens) for used in usage.report()] == [(2, 6)]
