"""Whose turn it is among the requests that wait: virtual token counters (Sheng et al. 2024, "Fairness in Serving Large
Language Models").

    counter[party] += (INPUT_COST · prompt tokens computed + OUTPUT_COST · tokens sampled) / weight[party]

The party with the lowest counter goes first, its own requests by arrival. A party that comes back is lifted to the
lowest counter of those that wait: what it did not use while it was away it cannot spend now. Plain counting, no torch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Mapping

from deltaserve.engine.types import Request

INPUT_COST, OUTPUT_COST = 1.0, 2.0  # as in the paper; a prompt's tokens share one pass over the weights


class FairQueue:
    """Waiting requests by party (`Request.party`), and what each party has been served."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._waiting: dict[str, deque[Request]] = {}
        self._counters: dict[str, float] = {}
        self._since: dict[str, int] = {}  # when each party began to wait: the first of two equal counters goes first
        self._clock = itertools.count()
        self._last_left = 0.0  # counter of the party that was the last to have nothing waiting

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Request]:
        """Party by party, the one whose turn it is first."""
        for party in sorted(self._waiting, key=self.turn):
            yield from self._waiting[party]

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting.get(request.party, ())

    @property
    def parties(self) -> Collection[str]:
        """Those that wait."""
        return self._waiting.keys()

    def weight(self, party: str) -> float:
        return self._weights.get(party, 1.0)

    def counter(self, party: str) -> float:
        return self._counters.get(party, 0.0)

    def turn(self, party: str) -> tuple[float, int]:
        """The lowest goes first."""
        return self.counter(party), self._since.get(party, 0)

    def add(self, request: Request) -> None:
        party = request.party
        if party not in self._waiting:
            least = min(map(self.counter, self._waiting), default=self._last_left)
            self._counters[party] = max(self.counter(party), least)
        self._own(party).append(request)

    def put_back(self, request: Request) -> None:
        """First of its party again; nothing is lifted."""
        self._own(request.party).appendleft(request)

    def remove(self, request: Request) -> None:
        own = self._waiting[request.party]
        own.remove(request)
        if not own:
            del self._waiting[request.party], self._since[request.party]
            self._last_left = self.counter(request.party)
            self._forget()

    def charge(self, party: str, num_input: int, num_output: int) -> None:
        """Negative numbers take a charge back."""
        cost = INPUT_COST * num_input + OUTPUT_COST * num_output
        self._counters[party] = self.counter(party) + cost / self.weight(party)

    def _own(self, party: str) -> deque[Request]:
        if party not in self._waiting:
            self._waiting[party] = deque()
            self._since[party] = next(self._clock)
        return self._waiting[party]

    def _forget(self) -> None:
        """Counters that the next `add` would lift anyway, once they are many."""
        if len(self._counters) > 2 * len(self._waiting) + 64:
            least = min(map(self.counter, self._waiting), default=self._last_left)
            gone = [p for p, counter in self._counters.items() if counter <= least and p not in self._waiting]
            for party in gone:
                del self._counters[party]
