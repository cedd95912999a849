"""A matrix kept exactly, entropy-coded: nothing reads it in packed form, it is decoded at load.

    stream = zlib(the four byte planes of the float32 values, lowest byte first)

The served form is a plain `Coded`: bfloat16 where that is exact (`value_bits` 16), float32 otherwise.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaserve_kernels.terms.coded import Coded
from deltaserve_kernels.terms.packed import Packed

LEVEL = 9


@dataclass(frozen=True)
class Exact(Packed):
    """[rows, cols]; stream uint8 [bytes]."""

    rows: int
    cols: int
    value_bits: int
    stream: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Exact:
        """float32 [rows, cols] →"""
        rows, cols = matrix.shape
        planes = matrix.contiguous().cpu().view(torch.uint8).view(-1, 4).T.contiguous()  # uint8 [4, rows · cols]
        stream = np.frombuffer(bytearray(zlib.compress(planes.numpy().tobytes(), LEVEL)), np.uint8)
        short = torch.equal(matrix.bfloat16().float(), matrix)
        return cls(rows, cols, 16 if short else 32, torch.from_numpy(stream))

    def decode(self) -> Tensor:
        """float32 [rows, cols]. Raises ValueError for a stream that is broken or of another length."""
        size = 4 * self.rows * self.cols
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(self.stream.cpu().numpy().tobytes(), size + 1)
        except zlib.error as error:
            raise ValueError(f"the stream is damaged: {error}") from None
        if len(raw) != size or not inflate.eof or inflate.unused_data:
            raise ValueError(f"the stream holds other than the {size} bytes of {self.rows} × {self.cols} float32")
        planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(4, -1)
        return planes.T.contiguous().view(torch.float32).view(self.rows, self.cols).to(self.stream.device)

    def problems(self) -> list[str]:
        try:
            values = self.decode()
        except ValueError as error:
            return [str(error)]
        if not bool(values.isfinite().all()):
            return ["the stream holds numbers that are not finite"]
        if self.value_bits == 16 and not torch.equal(values.bfloat16().float(), values):
            return ["value_bits 16, but the values are no bfloat16"]
        return []

    def serving(self) -> Coded:
        values = self.decode()
        served = values.bfloat16() if self.value_bits == 16 else values
        return Coded(self.rows, self.cols, self.value_bits, "float", served)
