"""What goes first: the cheap for its size, of equal ones the least recently used, and nothing stays for ever."""

from __future__ import annotations

from deltaserve.deltas.eviction import GreedyDual


def first(kept: GreedyDual[str], names: str) -> str:
    return min(names, key=kept.standing)


def test_of_equal_ones_the_least_recently_used_goes() -> None:
    kept = GreedyDual[str]()
    for name in "abca":
        kept.use(name, 1.0, 10)
    assert first(kept, "abc") == "b"


def test_what_is_cheap_for_its_size_goes_before_what_was_used_earlier() -> None:
    kept = GreedyDual[str]()
    kept.use("dear", 4.0, 10)
    kept.use("cheap", 1.0, 10)
    kept.use("large", 4.0, 80)
    assert sorted(["dear", "cheap", "large"], key=kept.standing) == ["large", "cheap", "dear"]


def test_what_is_not_used_goes_in_the_end_however_dear() -> None:
    kept = GreedyDual[str]()
    kept.use("dear", 5.0, 1)
    for turn in range(10):
        name = f"n{turn}"
        kept.use(name, 1.0, 1)
        if min(["dear", name], key=kept.standing) == "dear":
            break
        kept.remove(name)
    assert turn == 4


def test_what_went_by_itself_makes_nothing_older() -> None:
    kept = GreedyDual[str]()
    kept.use("gone", 9.0, 1)
    kept.remove("gone", evicted=False)
    kept.remove("gone")
    kept.use("new", 1.0, 1)
    assert kept.standing("new")[0] == 1.0
