"""Which columns of a row survive. `columns` int64 [rows, survivors] is the definition, ascending group by group.

The columns of a row are cut into groups of `group` (the last may be shorter); `keep` of each group survive, or all of a
shorter one. One seeded survivor a group is drawn uniformly; several are the `keep` smallest of a word for each column.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.philox import random_words
from deltaserve_kernels.terms.packed import Packed


@dataclass(frozen=True)
class GroupMask(Packed):
    """`keep` survivors in each `group` consecutive columns."""

    group: int
    keep: int = field(default=1, kw_only=True)

    def num_groups(self, cols: int) -> int:
        return -(-cols // self.group)

    def num_survivors(self, cols: int) -> int:
        """Of a row."""
        return cols // self.group * self.keep + min(cols % self.group, self.keep)

    def group_sizes(self, cols: int, device: str = "cpu") -> Tensor:
        """int64 [groups]"""
        starts = torch.arange(0, cols, self.group, device=device)
        return (cols - starts).clamp(max=self.group)

    def group_of(self, cols: int, device: str = "cpu") -> Tensor:
        """int64 [survivors]: the group of each survivor."""
        return torch.arange(self.num_survivors(cols), device=device) // self.keep

    def inverse_rate(self, cols: int, device: str = "cpu") -> Tensor:
        """float32 [survivors]: 1 / P(a column of this group survives), what makes a dropped matrix unbiased."""
        sizes = self.group_sizes(cols, device)
        return (sizes / sizes.clamp(max=self.keep))[self.group_of(cols, device)]


@dataclass(frozen=True)
class SeededMask(GroupMask):
    """Drawn, never stored: words of `philox.random_words(seed, site, stream=stream)`, one row of them for each `tile`
    rows of the matrix, which therefore share their columns.

    keep = 1   survivor of group g with G columns: g·group + (word(r, g) · G >> 32), each of probability 1/G up to 2^-32
    keep > 1   one word a column; the `keep` smallest of a group survive (equal words: the lower column first)
    """

    seed: int
    site: int
    stream: int = 0
    tile: int = 1

    def columns(self, rows: int, cols: int, device: str = "cpu") -> Tensor:
        tiles = -(-rows // self.tile)
        drawn = self._one(tiles, cols, device) if self.keep == 1 else self._several(tiles, cols, device)
        return drawn if self.tile == 1 else drawn.repeat_interleave(min(self.tile, rows), 0)[:rows]

    def _words(self, rows: int, count: int, device: str) -> Tensor:
        return random_words(self.seed, self.site, rows, count, stream=self.stream, device=device)

    def _one(self, rows: int, cols: int, device: str) -> Tensor:
        starts = torch.arange(0, cols, self.group, device=device)
        return starts + (self._words(rows, self.num_groups(cols), device) * self.group_sizes(cols, device) >> 32)

    def _several(self, rows: int, cols: int, device: str) -> Tensor:
        groups, group = self.num_groups(cols), min(self.group, cols)
        words = torch.full((rows, groups * group), 2**32, device=device)  # past the last column: never smallest
        words[:, :cols] = self._words(rows, cols, device)
        order = words.view(rows, groups, group).argsort(dim=-1, stable=True)[..., : self.keep].sort(-1).values
        starts = torch.arange(0, groups * group, group, device=device)[:, None]
        places: Tensor = starts + order
        return places.flatten(1)[:, : self.num_survivors(cols)]


@dataclass(frozen=True)
class ExplicitMask(GroupMask):
    """Stored: `places` uint8 [rows, bytes], the survivors' places within their groups, packed in `place_bits` each."""

    places: Tensor

    @property
    def place_bits(self) -> int:
        return place_bits(self.group)

    def columns(self, rows: int, cols: int, device: str = "cpu") -> Tensor:  # noqa: ARG002 (stored for all its rows)
        places = layout.unpack(self.places, self.place_bits, self.num_survivors(cols)).long()
        return self.group_of(cols, str(places.device)) * self.group + places


def place_bits(group: int) -> int:
    """Bits that say a place in a group of 2 … 65 536."""
    return max(1, (group - 1).bit_length())
