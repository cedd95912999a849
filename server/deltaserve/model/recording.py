"""A function of tensors at fixed places, recorded once on a device and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class RecordingFailed(Exception):
    """A step could not be recorded."""


class Recording(NamedTuple):
    first: Tensor  # what the function gave when it ran, before it was recorded
    output: Tensor  # written by each replay
    replay: Callable[[], None]


Record: TypeAlias = Callable[[Callable[[], Tensor]], Recording]


class GraphLimits(NamedTuple):
    rows: int  # of a step that is recorded
    slots: int
    positions: int  # of a sequence
    required: bool = False  # a model that cannot be recorded is refused
    record: Record | None = None  # None: CUDA graphs


def cuda_recorder() -> Record:
    """CUDA graphs that share one pool of memory, on one stream: they never run at the same time."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(run: Callable[[], Tensor]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first = run().clone()  # what is made at the first call is not made while recording
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads load deltas meanwhile
            try:
                output = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return Recording(first, output, graph.replay)

    return record


@contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """The host waiting for the device is an error: it would spoil a recording, after which torch's allocator is not
    whole again. For all threads, so only while nothing is served."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
