"""Buffers and tables of one step of the native decoder: which rows belong to whom, and where their KV is."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deltaserve.deltas.resident import ResidentDelta
from deltaserve.model.native_delta import NativeDelta
from deltaserve.model.native_weights import NativeWeights
from deltaserve.model.shape import LlamaShape
from deltaserve.model.step import Step
from deltaserve_kernels.native.decoder import PAGE, CAttention, CGated, CNormRun, CRotary
from deltaserve_kernels.segments import Segments

RUN = np.dtype([("start", "i4"), ("rows", "i4"), ("parts", "i4"), ("unused", "i4"), ("part", "u8")])  # CRun


class _Model(Protocol):
    @property
    def shape(self) -> LlamaShape: ...
    @property
    def weights(self) -> NativeWeights: ...
    def delta(self, delta: ResidentDelta) -> NativeDelta: ...
    def buffer(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor: ...


class Runs:
    """For each site of the model, the runs of a step and their parts."""

    def __init__(self, model: _Model, segments: Segments, step: Step) -> None:
        self._deltas = [(model.delta(step.delta(run)), run.start, run.stop) for run in segments.runs]
        self.count = len(self._deltas)
        self._table = np.zeros((len(model.weights.linears), max(self.count, 1)), dtype=RUN)
        for column, (delta, start, stop) in enumerate(self._deltas):
            self._table["start"][:, column], self._table["rows"][:, column] = start, stop - start
            self._table["parts"][:, column], self._table["part"][:, column] = delta.counts, delta.addresses
        self._address, self._line = self._table.ctypes.data, self._table.strides[0]
        self._slow = [entry for entry in self._deltas if entry[0].slow]

    def at(self, site: int) -> int:
        return self._address + site * self._line

    def slow(self, site: int) -> Iterator[tuple[NativeDelta, int, int]]:
        return (entry for entry in self._slow if site in entry[0].slow)


@dataclass
class State:
    """Buffers and tables of one step."""

    h: Tensor  # float32 [T, hidden]
    x: Tensor  # bfloat16 [T, hidden padded]: normalised
    y: Tensor  # float32 [T, hidden padded]: of o and down
    wide: Tensor  # float32 [T, …]: of qkv and gate-up
    attended: Tensor  # bfloat16 [T, heads · size padded]
    activated: Tensor  # bfloat16 [T, intermediate padded]
    norm_runs: ctypes.Array[CNormRun]
    runs: Runs
    rotary: CRotary
    attention: CAttention
    gated: CGated
    kept: Sequence[object]  # what the structures point to

    @classmethod
    def of(cls, model: _Model, step: Step, positions: Tensor) -> State:
        shape, rows = model.shape, step.num_rows
        queries = shape.heads * shape.head_size

        def activations(name: str, size: int) -> Tensor:
            return model.buffer(name, rows, -(-size // 32) * 32, torch.bfloat16)

        def sums(name: str, width: int) -> Tensor:
            return model.buffer(name, rows, width, torch.float32)

        x, attended = activations("x", shape.hidden), activations("attended", queries)
        activated = activations("activated", shape.intermediate)
        wide = sums("wide", max(model.weights.groups[0].width, model.weights.groups[2].width))
        runs = Runs(model, step.segments, step)
        norm_runs, tables = _norm_runs(model, step)
        most = max(len(span.blocks) for span in step.spans) * step.block_size // PAGE
        pages = np.zeros((len(step.spans), most), dtype=np.int32)
        slots, lengths, sequences = (np.empty(rows, dtype=np.int32) for _ in range(3))
        each = step.block_size // PAGE
        for number, span in enumerate(step.spans):
            own = (np.asarray(span.blocks, dtype=np.int32)[:, None] * each + np.arange(each, dtype=np.int32)).ravel()
            pages[number, : len(own)] = own
            place = np.arange(span.length - (span.stop - span.start), span.length, dtype=np.int32)
            slots[span.start : span.stop] = own[place // PAGE] * PAGE + place % PAGE
            lengths[span.start : span.stop], sequences[span.start : span.stop] = place + 1, number
        queried, at = model.buffer("queried", rows, queries, torch.bfloat16), positions.int()
        rotary = CRotary(
            y=wide.data_ptr(), cos_sin=model.weights.cos_sin.data_ptr(), positions=at.data_ptr(),
            slots=slots.ctypes.data, q=queried.data_ptr(), ldy=wide.stride(0), rows=rows, heads=shape.heads,
            kv_heads=shape.kv_heads, size=shape.head_size, runs=len(norm_runs), q_norm=-1, k_norm=-1,
            eps=shape.norm_eps, run=ctypes.addressof(norm_runs),
        )  # fmt: skip
        attention = CAttention(
            q=queried.data_ptr(), pages=pages.ctypes.data, sequences=sequences.ctypes.data, lengths=lengths.ctypes.data,
            out=attended.data_ptr(), ldout=attended.stride(0), rows=rows, heads=shape.heads, kv_heads=shape.kv_heads,
            size=shape.head_size, most_pages=most, scale=shape.head_size**-0.5,
        )  # fmt: skip
        gated = CGated(
            y=wide.data_ptr(), out=activated.data_ptr(), ldy=wide.stride(0), ldout=activated.stride(0), rows=rows,
            size=shape.intermediate,
        )  # fmt: skip
        return cls(
            sums("h", shape.hidden), x, sums("y", model.weights.groups[1].width), wide, attended, activated,
            norm_runs, runs, rotary, attention, gated, (tables, pages, slots, lengths, sequences, queried, at),
        )  # fmt: skip


def _norm_runs(model: _Model, step: Step) -> tuple[ctypes.Array[CNormRun], list[object]]:
    """All rows of the step, those of the base among them; and the tables that they point to."""
    base = model.weights.norm_table
    found, row = [], 0
    for run in step.segments.runs:
        if run.start > row:
            found.append((row, run.start - row, base))
        found.append((run.start, run.stop - run.start, model.delta(step.delta(run)).norms))
        row = run.stop
    if row < step.num_rows:
        found.append((row, step.num_rows - row, base))
    runs = (CNormRun * len(found))(*(CNormRun(start, rows, ctypes.addressof(table)) for start, rows, table in found))
    return runs, [table for _, _, table in found]
