"""Scheduler, runner and model without threads or HTTP: one call is one step, and every step's logits are kept."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.loop import RETRY_S
from deltaserve.engine.runner import ChunkResult, Runner, mixed
from deltaserve.engine.scheduler import Chunk, Scheduler
from deltaserve.engine.types import Request, SamplingParams
from deltaserve.ids import DeltaDigest, RequestId, Slot
from deltaserve.model.load import TransformersModel, load_model
from deltaserve.model.native import NativeModel
from deltaserve.model.served import ServedModel
from deltaserve_kernels.native.decoder import PAGE

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from deltaserve.deltas.resident import ResidentDelta
    from deltaserve.engine.types import DeltaGate
    from deltaserve.errors import DeltaServeError

CPU = torch.device("cpu")
WAIT_S = 20.0
_serial = itertools.count()


def load(base: Path, kv_slots: int, dtype: torch.dtype = torch.float32) -> ServedModel:
    """In bfloat16 by the native decoder, where it runs the base."""
    return load_model(Checkpoint.open(base), device=CPU, dtype=dtype, kv_slots=kv_slots, block_size=PAGE)


class Mute:
    """A text sink for those who read tokens."""

    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:  # noqa: ARG002
        return "", None

    def finish(self) -> str:
        return ""


def make_request(prompt: Sequence[int], digest: str | None = None, *, max_tokens: int = 5, **params: Any) -> Request:
    params.setdefault("temperature", 0.0)
    return Request(
        id=RequestId(f"r{next(_serial)}"),
        digest=None if digest is None else DeltaDigest(digest),
        prompt_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        eos_ids=frozenset(),
        vocab_size=1 << 20,
        sink=Mute(),
        emit=lambda event: None,
    )


class FixedGate:
    """Every delta is there."""

    def __init__(self, slots: Sequence[str]) -> None:
        self._slots = list(slots)
        self.pins = [0] * len(self._slots)

    def try_pin(self, digest: DeltaDigest) -> Slot | None:
        slot = Slot(self._slots.index(digest))
        self.pins[slot] += 1
        return slot

    def unpin(self, slot: Slot) -> None:
        self.pins[slot] -= 1

    def is_ready(self, digest: DeltaDigest) -> bool:
        return digest in self._slots

    def check_together(self, digests: Collection[DeltaDigest]) -> None:
        assert len(digests) <= len(self._slots)

    def want(self, digests: Sequence[DeltaDigest], held: Collection[DeltaDigest] = ()) -> None:
        pass

    def overdue(self) -> list[Slot]:
        return []


class RecordingRunner(Runner):
    """Keeps, for each request, the logits that each of its tokens came from."""

    def __init__(self, model: ServedModel, slots: Sequence[ResidentDelta | None], block_size: int) -> None:
        super().__init__(model, slots, block_size)
        self.logits: dict[RequestId, list[torch.Tensor]] = {}

    def _results(self, chunks: Sequence[Chunk], logits: Sequence[Sequence[torch.Tensor]]) -> list[ChunkResult]:
        for chunk, own in zip(chunks, logits, strict=True):
            if chunk.samples:
                self.logits.setdefault(chunk.request.id, []).append(mixed(chunk.request, own)[-1].clone())
        return super()._results(chunks, logits)


class Patience:
    """Where requests wait: for `ready`, and not longer than WAIT_S since something `moved`."""

    def __init__(self, ready: threading.Event) -> None:
        self._ready = ready
        self.moved()

    def moved(self) -> None:
        self._moved_s = time.monotonic()

    def wait(self) -> None:
        assert time.monotonic() - self._moved_s < WAIT_S, "nothing runs and nothing loads"
        self._ready.wait(RETRY_S)


class Rig:
    def __init__(
        self,
        model: ServedModel,
        gate: DeltaGate,
        slots: Sequence[ResidentDelta | None],
        *,
        block_size: int | None = None,
        num_blocks: int | None = None,
        max_num_seqs: int = 16,
        budget: int = 64,
        salt: bytes | None = None,
    ) -> None:
        block_size = block_size or (PAGE if isinstance(model, NativeModel) else 4)
        self.model = model
        self.blocks = BlockPool(num_blocks or model.kv_slots // block_size, block_size, salt)
        self.scheduler = Scheduler(self.blocks, gate, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        self.runner = RecordingRunner(model, slots, block_size)
        self.ready = threading.Event()  # set by residency: something was loaded
        self.errors: dict[RequestId, DeltaServeError] = {}
        self.num_steps = 0

    @classmethod
    def of(cls, model: ServedModel, deltas: dict[str, ResidentDelta] | None = None, **options: Any) -> Rig:
        deltas = deltas or {}
        return cls(model, FixedGate(list(deltas)), list(deltas.values()), **options)

    def step(self) -> bool:
        """False if nothing could run."""
        chunks, failed = self.scheduler.plan()
        for request, error in failed:
            self.scheduler.remove(request)
            self.errors[request.id] = error
        if not chunks:
            return bool(failed)
        self.num_steps += 1
        for chunk, result in zip(chunks, self.runner.run(chunks), strict=True):
            request = chunk.request
            request.num_computed += chunk.num_tokens
            request.prompt_reports += result.prompt_logprobs
            if result.sampled is not None:
                request.tokens.append(result.sampled.token_id)
                for row, logprob in zip(request.rows, result.row_logprobs, strict=False):
                    row.logprob += logprob
                if request.num_generated >= request.params.max_tokens:
                    self.scheduler.remove(request)
        return True

    def run(self, *requests: Request) -> list[list[int]]:
        """Adds `requests` and steps until nothing is left; → what each was answered."""
        for request in requests:
            self.scheduler.add(request)
        patience = Patience(self.ready)
        while len(self.scheduler):
            self.ready.clear()
            if self.step():
                patience.moved()
            else:
                patience.wait()
        assert self.blocks.num_free == self.blocks.num_blocks
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> list[int]:
        return request.tokens[len(request.prompt_ids) :]

    def logits(self, request: Request) -> torch.Tensor:
        """float32 [tokens, vocabulary]; −inf past the request's own vocabulary is cut off."""
        rows = torch.stack([row[: self._width(request)] for row in self.runner.logits[request.id]])
        return rows[:, rows.isfinite().all(0)]

    def _width(self, request: Request) -> int:
        return min(len(row) for row in self.runner.logits[request.id])

    @torch.inference_mode()
    def poison_cache(self) -> None:
        if isinstance(self.model, NativeModel):
            layers = [(self.model.keys, self.model.values)]
        else:
            assert isinstance(self.model, TransformersModel)
            layers = list(self.model.context.cache._layers.values())
        for keys, values in layers:
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
