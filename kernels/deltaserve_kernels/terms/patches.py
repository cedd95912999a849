"""Square tiles of a matrix, the absent ones zero.

    decode[i·p : (i+1)·p, j·p : (j+1)·p] = scale[k] · grid(codes[k])       patch k is the k-th present one, row by row

A patch that hangs over the edge keeps p · p codes; those outside are ignored. grid: odd (Coded), ±1 at 1 bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.terms.packed import DERIVED, Packed


@dataclass(frozen=True)
class Patches(Packed):
    """[rows, cols] in patches of `size` × `size`.

    present uint8 [ceil(patches / 8)]: one bit a patch, in layout's order;  codes uint8 [n, packed_bytes(size², bits)]
    scale   float [n];  index int64 [n]: where each patch is, made at load by `serving`
    """

    rows: int
    cols: int
    size: int
    bits: int
    codes: Tensor
    scale: Tensor
    present: Tensor
    index: Tensor | None = field(default=None, metadata=DERIVED)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Patches down and across."""
        return -(-self.rows // self.size), -(-self.cols // self.size)

    def places(self) -> Tensor:
        """int64 [n]: row-major numbers of the present patches."""
        down, across = self.grid_shape
        return layout.unpack(self.present, 1, down * across).nonzero().flatten()

    def problems(self) -> list[str]:
        found = len(self.places())
        return [] if found == len(self.scale) else [f"{len(self.scale)} patches, but {found} are said to be present"]

    def values(self, dtype: torch.dtype) -> Tensor:
        """[n, size, size], scaled."""
        steps = torch.arange(2**self.bits, device=self.codes.device, dtype=dtype)
        levels = layout.lookup(self.codes, 2 * steps - (2**self.bits - 1), self.bits, self.size**2)
        return (levels * self.scale.to(dtype)[:, None]).view(-1, self.size, self.size)

    def serving(self) -> Patches:
        return self if self.index is not None else replace(self, index=self.places())

    def decode(self) -> Tensor:
        """float32 [rows, cols]"""
        down, across = self.grid_shape
        tiles = torch.zeros(down * across, self.size, self.size, device=self.codes.device)
        tiles[self.places()] = self.values(torch.float32)
        whole = tiles.view(down, across, self.size, self.size).transpose(1, 2)
        return whole.reshape(down * self.size, across * self.size)[: self.rows, : self.cols].contiguous()
