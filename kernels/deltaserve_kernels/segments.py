"""Which rows of a step belong to which tenant slot. Built once a step, shared by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BASE_SLOT = -1


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the step belong to `slot` ≥ 0."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segments:
    """The runs of equal slot in a step whose rows are sorted by slot. Slot −1 (base only) has no segment."""

    runs: tuple[Segment, ...] = ()

    @classmethod
    def of(cls, slots: Sequence[int]) -> Segments:
        """`slots` int [T], −1 = base: rows of one slot must be adjacent. Raises ValueError where they are not."""
        if len(slots) and min(slots) < BASE_SLOT:
            raise ValueError(f"a slot is −1 (base) or more: {list(slots)}")
        runs: list[Segment] = []
        start = 0
        for row in range(1, len(slots) + 1):
            if row < len(slots) and slots[row] == slots[start]:
                continue
            if slots[start] != BASE_SLOT:
                runs.append(Segment(slots[start], start, row))
            start = row
        if len({run.slot for run in runs}) != len(runs):
            raise ValueError(f"rows are not sorted by slot: {list(slots)}")
        return cls(tuple(runs))
