"""A function of tensors at fixed places, recorded once on a device and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class RecordingFailed(Exception):
    """A step could not be recorded; from now on none is."""


class Recording(NamedTuple):
    output: Tensor  # written by each replay
    replay: Callable[[], None]


Record: TypeAlias = Callable[[Callable[[], Tensor]], Recording]


class GraphLimits(NamedTuple):
    rows: int  # of a step that is recorded
    slots: int
    required: bool = False  # a model that cannot be recorded is refused
    record: Record | None = None  # None: CUDA graphs


def cuda_recorder() -> Record:
    """CUDA graphs that share one pool of memory: they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> Recording:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at the first call is not made while recording
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads load deltas meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = run()
        return Recording(output, graph.replay)

    return record
