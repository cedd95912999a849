"""Where the time of one decode step goes, in this process: the same model, runner and scheduler as the server's."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from deltaserve.deltas.checkpoint import Checkpoint
from deltaserve.deltas.resident import ResidentDelta
from deltaserve.engine.blocks import BlockPool
from deltaserve.engine.runner import Runner
from deltaserve.engine.scheduler import Scheduler
from deltaserve.engine.types import Request, SamplingParams
from deltaserve.ids import DeltaDigest, RequestId, Slot
from deltaserve.model import delta_layers, native
from deltaserve.model.load import load_model

import common

CONTEXT, STEPS, BLOCK = 64, 30, 16


class _Slots:
    """Every tenant has a slot from the start."""

    def __init__(self, names: Sequence[str]) -> None:
        self._slot = {name: Slot(i) for i, name in enumerate(names)}

    def try_pin(self, digest: DeltaDigest) -> Slot:
        return self._slot[digest]

    def unpin(self, slot: Slot) -> None:
        pass

    def want(self, digests: Sequence[DeltaDigest], held: Collection[DeltaDigest] = ()) -> None:
        pass

    def overdue(self) -> list[Slot]:
        return []


class _Silent:
    def push(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:  # noqa: ARG002
        return "", None

    def finish(self) -> str:
        return ""


def profile_decode(base: Checkpoint, tenants: Sequence[str | None]) -> dict[str, float]:
    """Medians in ms over STEPS decode steps of len(tenants) sequences at a context of about 64 tokens."""
    model = load_model(base, device=torch.device("cpu"), dtype=torch.bfloat16, kv_slots=4096, block_size=BLOCK)
    names = sorted({name for name in tenants if name})
    slots: list[ResidentDelta | None] = [model.load_delta(common.artifact(name)) for name in names]
    runner = Runner(model, slots, BLOCK)
    scheduler = Scheduler(BlockPool(4096 // BLOCK, BLOCK), _Slots(names), max_num_seqs=64, max_num_batched_tokens=4096)
    for index, name in enumerate(tenants):
        scheduler.add(_request(index, name))
    spent: dict[str, float] = defaultdict(float)
    steps: list[dict[str, float]] = []
    with _timed(spent):
        for number in range(STEPS + 3):
            spent.clear()
            began = time.perf_counter()
            chunks, _ = scheduler.plan()
            planned = time.perf_counter()
            for chunk, result in zip(chunks, runner.run(chunks), strict=True):
                chunk.request.num_computed += chunk.num_tokens
                assert result.sampled
                chunk.request.tokens.append(result.sampled.token_id)
            ended = time.perf_counter()
            if number > 2:  # the prompts, and two steps to warm up
                steps.append({**spent, "scheduling": planned - began, "whole step": ended - began})
    medians = {name: statistics.median(step.get(name, 0.0) for step in steps) * 1e3 for name in steps[0]}
    told = sum(value for name, value in medians.items() if name != "whole step")
    medians["norms, rotary, activations, Python"] = medians["whole step"] - told
    return {name: round(value, 2) for name, value in medians.items()}


def _request(index: int, name: str | None) -> Request:
    return Request(
        id=RequestId(str(index)),
        digest=DeltaDigest(name) if name else None,
        prompt_ids=[1 + (index * 7919 + i * 104729) % 40000 for i in range(CONTEXT)],
        params=SamplingParams(max_tokens=STEPS + 8, temperature=0, ignore_eos=True),
        eos_ids=frozenset(),
        vocab_size=49152,
        sink=_Silent(),
        emit=lambda _event: None,
    )


@contextmanager
def _timed(spent: dict[str, float]) -> Iterator[None]:
    """Clocks around the parts. A delta's time is taken out of the linear that contains it."""
    undo: list[Callable[[], None]] = []

    def wrap(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            inner = spent["delta terms"] + spent["overrides"]
            began = time.perf_counter()
            result = original(*args, **kwargs)
            took = time.perf_counter() - began
            spent[label] += took - (spent["delta terms"] + spent["overrides"] - inner)
            return result

        setattr(owner, name, clocked)
        undo.append(lambda: setattr(owner, name, original))

    wrap(delta_layers.DeltaLinear, "forward", "base linears")
    wrap(delta_layers.DeltaLinear, "_add", "delta terms")
    wrap(delta_layers.DeltaModule, "_with_tensors", "overrides")
    wrap(delta_layers.DeltaHead, "forward", "lm_head")
    wrap(torch.nn.functional, "scaled_dot_product_attention", "attention")
    wrap(native.NativeModel, "_product", "linears, deltas among them")
    wrap(native.NativeModel, "_attend", "rotary, attention")
    wrap(native.NativeModel, "_logits", "lm_head")
    try:
        yield
    finally:
        for restore in undo:
            restore()
