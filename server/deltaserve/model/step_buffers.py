"""What recorded steps read of a step, at fixed places of the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.model.attention import Span
from deltaserve_kernels.fused.tables import Tables


class StepBuffers:
    """What recordings read, at fixed places; `host` is written first, and all of a type copied at once."""

    def __init__(self, rows: int, slots: int, blocks: int, device: torch.device) -> None:
        shapes = {
            torch.int64: {"write_slots": rows, "slots": slots},
            torch.int32: {"lengths": rows, "row_slots": rows, "rows": 1 + 3 * rows, "tiles": 1 + 3 * rows},
        }
        pinned = device.type == "cuda"
        self._pairs: list[tuple[Tensor, Tensor]] = []  # all of a type: on the host, on the device
        self.host: dict[str, Tensor] = {}
        self.device: dict[str, Tensor] = {}
        for kind, sizes in shapes.items():
            size = sum(map(_aligned, sizes.values()))
            pair = (torch.zeros(size, dtype=kind, pin_memory=pinned), torch.zeros(size, dtype=kind, device=device))
            self._pairs.append(pair)
            for flat, views in zip(pair, (self.host, self.device), strict=True):
                start = 0
                for name, length in sizes.items():
                    views[name] = flat[start : start + length]
                    start += _aligned(length)
        self._blocks = torch.zeros(rows, blocks, dtype=torch.int32, pin_memory=pinned)
        self.device["blocks"] = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self._written: list[tuple[Sequence[int], int]] = [((), 0)] * rows  # whose blocks a row holds, and how many

    def fill(self, spans: Sequence[Span], block_size: int, tables: Tables, unused_slot: int) -> None:
        """Rows that the step lacks write to `unused_slot` and read nothing. `spans`: of one row each."""
        rows, host, blocks = len(spans), self.host, self._blocks.numpy()
        for row, (_, _, length, own) in enumerate(spans):
            count = -(-length // block_size)
            kept, done = self._written[row]
            if kept is not own or done > count:
                done = 0
            if done < count:  # a sequence's blocks are added to, or are another list
                blocks[row, done:count] = own[done:count]
                self._written[row] = own, count
        last = [divmod(span.length - 1, block_size) for span in spans]
        write_slots = [span.blocks[block] * block_size + at for span, (block, at) in zip(spans, last, strict=True)]
        for name, values, rest in (
            ("write_slots", write_slots, unused_slot),
            ("lengths", [span.length for span in spans], 0),
            ("row_slots", tables.row_slots, -1),
        ):
            host[name][:rows] = torch.as_tensor(values)
            host[name][rows:] = rest
        for name, table in (("slots", tables.slots), ("rows", tables.rows), ("tiles", tables.tiles)):
            host[name][: len(table)] = table
        for here, there in self._pairs:
            there.copy_(here)  # ends before the next step writes to it
        self.device["blocks"][:rows].copy_(self._blocks[:rows])


def _aligned(length: int) -> int:
    """Numbers that are taken, so that the next begin on 16 bytes."""
    return -(-length // 4) * 4
