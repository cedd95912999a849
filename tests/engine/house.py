"""An engine over a fake runner, its clients, and what they hear."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.loop import Engine
from deltaserve.engine.runner import ChunkResult
from deltaserve.engine.sampling import Generators, Sampled
from deltaserve.engine.scheduler import Chunk, Scheduler
from deltaserve.engine.types import Event, Request, SamplingParams, TokenLogprob
from deltaserve.ids import DeltaDigest, RequestId, Slot
from deltaserve.metrics import Metrics

from .gate import Gate

if TYPE_CHECKING:
    from collections.abc import Sequence

WAIT_S = 20.0
EOS, DAMAGED = 2, 666
_serial = itertools.count()


class Letters:
    """Token n is the letter chr(n); `stop` ends the answer. Raises for the token 13."""

    def __init__(self, stop: str | None = None) -> None:
        self._stop = stop

    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:
        if token_id == 13:
            raise ValueError("no such letter")
        letter = chr(token_id)
        return ("", letter) if may_stop and letter == self._stop else (letter, None)

    def finish(self) -> str:
        return "."


class FailingGate(Gate):
    """`failure`: what trying it raises, until it is mended."""

    failure: Exception | None = None

    def try_pin(self, digest: DeltaDigest) -> Slot | None:
        if self.failure is not None:
            raise self.failure
        return super().try_pin(digest)


class FakeRunner:
    """Says the tokens of `script` in turn, then 97, 98, … A step waits while `hold` is clear."""

    def __init__(self) -> None:
        self.generators = Generators()
        self.script: dict[str, list[int]] = {}
        self.failures: list[Exception] = []
        self.culprits: set[str] = set()  # a step with one of these requests fails
        self.hold = threading.Event()
        self.hold.set()
        self.entered = threading.Event()
        self.num_steps = 0

    def run(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        self.num_steps += 1
        self.entered.set()
        assert self.hold.wait(WAIT_S)
        if self.failures:
            raise self.failures.pop()
        if self.culprits & {c.request.id for c in chunks}:
            raise RuntimeError("secret detail of the device")
        return [ChunkResult(c.request, self._sampled(c.request) if c.samples else None) for c in chunks]

    def _sampled(self, request: Request) -> Sampled:
        script = self.script.get(request.id, [])
        n = request.num_generated
        token = script[n] if n < len(script) else 97 + n % 26
        return Sampled(token, TokenLogprob(token, -1.0), finite=token != DAMAGED)


class Client:
    """A request and what it heard."""

    def __init__(self, house: House, *, digest: str | None = None, stop: str | None = None, **params: Any) -> None:
        params.setdefault("max_tokens", 4)
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.deaf = False
        self.request = Request(
            id=RequestId(f"r{next(_serial)}"),
            digest=None if digest is None else DeltaDigest(digest),
            prompt_ids=[1, 2, 3],
            params=SamplingParams(**params),
            eos_ids=frozenset({EOS}),
            vocab_size=1000,
            sink=Letters(stop),
            emit=self._hear,
        )
        self._house = house

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if event.finish_reason is not None:
            self.ended.set()
        if self.deaf:
            raise RuntimeError("the event loop is closed")

    def says(self, *tokens: int) -> Client:
        self._house.runner.script[self.request.id] = list(tokens)
        return self

    def submit(self) -> Client:
        self._house.engine.submit([self.request])
        return self

    def wait(self) -> Event:
        """The last event, which is the only one with a finish reason."""
        assert self.ended.wait(WAIT_S)
        assert [event.finish_reason is not None for event in self.events] == [False] * (len(self.events) - 1) + [True]
        return self.events[-1]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]


class House:
    """An engine over a fake runner. On the way out: everything was given back."""

    def __init__(
        self, *, queue: int = 64, each: int | None = None, seats: int = 4, blocks: int = 64, budget: int = 64
    ) -> None:
        self.gate, self.runner, self.metrics = FailingGate(), FakeRunner(), Metrics("test")
        self.blocks = BlockPool(blocks, 4)
        scheduler = Scheduler(self.blocks, self.gate, max_num_seqs=seats, max_num_batched_tokens=budget)
        self.engine = Engine(
            scheduler,
            self.runner,  # type: ignore[arg-type]
            self.metrics,
            max_num_queued=queue,
            max_num_queued_per_tenant=each,
        )
        self.engine.start()

    def client(self, **options: Any) -> Client:
        return Client(self, **options)

    def close(self) -> None:
        self.runner.hold.set()
        self.engine.stop(WAIT_S)
        assert not self.engine.is_alive
        assert self.blocks.num_free == self.blocks.num_blocks
        assert not +self.gate.pins
        assert (self.engine.num_running, self.engine.num_waiting) == (0, 0)
        assert not self.engine._live
        assert not self.runner.generators._by_request
