"""What a kernel is told of a part: int64 [16] in the delta's own memory, a float by its bits in the lower half."""

from __future__ import annotations

import struct
from collections.abc import Hashable
from enum import IntEnum
from typing import NamedTuple

WORDS = 16
UNIT = 16  # bytes: offsets count these, from the start of the delta's memory; 0: there is none
IN_UNIT = 128  # columns
KINDS = ("rescale", "variant", "codes", "gather", "grid", "patches", "vector")
TAGS = 32


class Field(IntEnum):
    KEY = 0  # number of the Launch that reads it
    BITS = 1  # of a code or an entry
    CODES = 2  # offset
    ROW = 3  # offset: float32 [rows], scales
    SCALE = 4  # float32, of everything
    COUNT = 5  # superblocks, entries of a row, segments, or columns of a variant
    VARIANT = 6  # which form of the input it reads: 0, or one of its own
    ZERO = 7  # float32: the code that stands for nothing
    GROUP_SCALE = 8  # offset: float32 [row tiles][groups][64], or a scale for each patch
    STARTS = 9  # offset, int32: origin and value table of each entry; first patch of each row; columns of a variant
    VALUES = 10  # offset: what value codes stand for; vectors of a grid; columns of patches; factors of a variant
    INDEX_BITS = 11  # lower bits of an entry: the index, the others its value code; columns that share a scale of codes
    ROWS = 12  # of the part
    IN = 13  # first column of its input, in units of 128
    OUT = 14  # first column of its output
    TILE = 15  # rows that share an entry; groups of a row of codes


class Launch(NamedTuple):
    """What one kernel call has in common: parts of the same launch, whoever's they are, run together.

    phase: 0 input, 1 y, 2 the factors between, 3 y from them. `about`: what its kernel is compiled or called for: the
    columns of a group, the length of a vector, the size of a patch, a rotation of the input, a book and its variant.
    `turned`: the rotation that is undone on its output.
    """

    phase: int
    kind: str
    about: Hashable = 0
    turned: Hashable = None

    @property
    def tag(self) -> int:
        """Its number modulo TAGS: what a kernel that reads every part of a site tells them apart by."""
        return 8 * self.phase + KINDS.index(self.kind)

    @property
    def order(self) -> tuple[int, str, str, str]:
        return self.phase, self.kind, repr(self.about), repr(self.turned)


def float_bits(value: float) -> int:
    """The float32's bits as a number ≥ 0."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
