"""What the time of a refusal tells of a key. The claim is structural (tests/accounts: the same two comparisons of 32
bytes, whatever was given); here the clock looks for what that might have missed."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import pytest

from deltaserve.errors import AuthenticationFailed
from deltaserve.tenants.accounts import Accounts, Scope
from deltaserve.tenants.keys import Keys
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 4000


def test_a_refusal_takes_no_longer_the_more_of_the_key_is_right(tmp_path: Path) -> None:
    registry = SqliteRegistry(tmp_path)
    accounts = Accounts(registry)
    keys = Keys(registry, accounts, "first")
    _, text = keys.create(accounts.default, [Scope.INFERENCE], "test")
    start = len("ds-") + 16 + 1
    guesses = {
        "nothing right": text[:start] + "A" * (len(text) - start),
        "half right": text[: start + 21] + "A" * (len(text) - start - 21),
        "all but the last": text[:-2] + ("AA" if text[-2:] != "AA" else "BB"),
    }
    times: dict[str, list[int]] = {name: [] for name in guesses}
    for _ in range(ROUNDS):
        for name, guess in guesses.items():
            began = time.perf_counter_ns()
            with pytest.raises(AuthenticationFailed):
                keys.authenticate(guess)
            times[name].append(time.perf_counter_ns() - began)
    medians = [statistics.median(spent) for spent in times.values()]
    noise = statistics.median(
        statistics.quantiles(spent, n=4)[2] - statistics.quantiles(spent, n=4)[0] for spent in times.values()
    )
    assert max(medians) - min(medians) < max(noise, 200), medians
    registry.close()
