"""Linear layers that share an input, packed, and the parts that deltas add to them: one call for all rows of a step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels.native import packing
from deltaserve_kernels.native.library import Arena, Library
from deltaserve_kernels.native.parts import CPart, Part


class _CSite(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("tiles", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class CRun(ctypes.Structure):
    """Rows [start, start + rows) of a step and what their delta adds."""

    _fields_ = [
        ("start", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("part", ctypes.c_void_p),
    ]


class PartList:
    """Parts of one delta at one site, as the kernels read them. Keeps their tensors."""

    def __init__(self, parts: Sequence[tuple[Part, int, float]]) -> None:
        """(part, first row of the site, gamma) of each."""
        self.parts = [part for part, _, _ in parts]
        readers = [
            next(j for j in range(i + 1) if i == j or part.reads_as(self.parts[j])) for i, part in enumerate(self.parts)
        ]
        self._structures = [
            part.structure(first, gamma, reader) for (part, first, gamma), reader in zip(parts, readers, strict=True)
        ]
        self._array = (CPart * len(parts))(*self._structures)
        self.length = len(parts)
        self.address = ctypes.addressof(self._array)


class PackedSite:
    """y = x·Wᵀ + b and the parts of each run, W [rows, cols] in bfloat16 tiles; without a weight, the parts alone."""

    def __init__(
        self,
        rows: int,
        cols: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        arena: Arena | None = None,
    ) -> None:
        self.rows, self.cols = rows, cols
        packed = None if weight is None else packing.tiles(weight.bfloat16()).contiguous()
        self.tiles = packed if packed is None or arena is None else arena.take(packed)
        self._bias = None if bias is None else bias.float().contiguous()
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (self.tiles, self._bias)]
        self._structure = _CSite(rows, cols, *pointers)
        self._address = ctypes.addressof(self._structure)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tiles, self._bias) if tensor is not None)

    def run(self, library: Library, x: Tensor, y: Tensor, runs: ctypes.Array[CRun] | int, count: int) -> None:
        """x bfloat16 [T, ≥ cols rounded up to 32], zero past cols; y float32 [T, ≥ rows rounded up to 32], changed.
        `runs` do not overlap."""
        library.functions.ds_site(
            self._address, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), x.shape[0], runs, count
        )

    def product(self, library: Library, x: Tensor, first: int, rows: int) -> Tensor:
        """x bfloat16 [T, cols] → x·Wᵀ of rows [first, first + rows), `first` a multiple of 32; float32 [T, rows]."""
        assert self.tiles is not None and first % 32 == 0
        own = _CSite(rows, self.cols, self.tiles[first // 32].data_ptr(), None)
        padded = F.pad(x, (0, -self.cols % 32)).contiguous()
        y = torch.empty(len(x), -(-rows // 32) * 32)
        library.functions.ds_site(
            ctypes.addressof(own), padded.data_ptr(), padded.stride(0), y.data_ptr(), y.stride(0), len(x), None, 0
        )
        return y[:, :rows]


def runs_of(lists: Sequence[tuple[int, int, PartList]]) -> ctypes.Array[CRun]:
    """(start, rows, parts) of each run."""
    return (CRun * max(len(lists), 1))(*(CRun(start, rows, own.length, 0, own.address) for start, rows, own in lists))


def apply_part(library: Library, x: Tensor, part: Part, gamma: float = 1.0) -> Tensor:
    """x [T, cols], taken in bfloat16 → gamma · x · Termᵀ, float32 [T, rows]."""
    padded = F.pad(x.bfloat16(), (0, -x.shape[1] % 32))
    y = torch.zeros(len(x), -(-part.rows // 32) * 32)
    own = PartList([(part, 0, gamma)])
    PackedSite(part.rows, x.shape[1]).run(library, padded, y, runs_of([(0, len(x), own)]), 1)
    return y[:, : part.rows]
