"""Which rows of a step are whose, and where their deltas lie: what every kernel reads from the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.segments import BASE_SLOT, Segments

ROWS_OF_A_SEGMENT = 8  # activations that share a tile of decoded weights


class Tables(NamedTuple):
    """Segments are int32 [1 + 3 · n]: n, then slot, first row and rows of each; what stands behind them is not read."""

    slots: Tensor  # int64 [slots]: where the slot's delta lies, in units of 16 bytes
    rows: Tensor  # segments of one row
    tiles: Tensor  # segments of up to ROWS_OF_A_SEGMENT
    row_slots: Tensor  # int32 [T], −1: no delta

    @classmethod
    def of(cls, segments: Segments, places: Mapping[int, int], num_rows: int) -> Tables:
        """On the host. `places` by slot: of runs whose delta the kernels read; the others' rows are as the base's."""
        runs = [run for run in segments.runs if run.slot in places]
        rows = [(run.slot, row, 1) for run in runs for row in range(run.start, run.stop)]
        tiles = [
            (run.slot, start, min(ROWS_OF_A_SEGMENT, run.stop - start))
            for run in runs
            for start in range(run.start, run.stop, ROWS_OF_A_SEGMENT)
        ]
        slots = [0] * (max(places, default=-1) + 1)
        for slot, place in places.items():
            slots[slot] = place
        row_slots = [BASE_SLOT] * num_rows
        for slot, row, _ in rows:
            row_slots[row] = slot
        segments_of = ([len(table), *(n for entry in table for n in entry)] for table in (rows, tiles))
        single, tiled, whose = (torch.tensor(table, dtype=torch.int32) for table in (*segments_of, row_slots))
        return cls(torch.tensor(slots, dtype=torch.int64), single, tiled, whose)

    def to(self, device: torch.device) -> Tables:
        return Tables(*(table.to(device) for table in self))
