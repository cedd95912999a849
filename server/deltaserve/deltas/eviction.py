"""Which of several things to let go of: GreedyDual-Size (Cao & Irani 1997).

    H(x) = clock + cost(x) / size(x), refreshed at every use; the lowest H goes, and the clock moves up to it

What costs much to bring back for its size stays longer, and nothing stays for ever unused; of equal ones, the least
recently used goes.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class GreedyDual(Generic[K]):
    def __init__(self) -> None:
        self._clock = 0.0
        self._uses = itertools.count()
        self._standing: dict[K, tuple[float, int]] = {}  # H, and when it was last used

    def use(self, key: K, cost: float, size: int) -> None:
        self._standing[key] = self._clock + cost / max(size, 1), next(self._uses)

    def standing(self, key: K) -> tuple[float, int]:
        """The lowest goes first."""
        return self._standing[key]

    def remove(self, key: K, *, evicted: bool = True) -> None:
        """Harmless for what is not there. `evicted`: it went for something else's sake, not by itself."""
        gone = self._standing.pop(key, None)
        if gone is not None and evicted:
            self._clock = max(self._clock, gone[0])
