"""Terms → parts: what src/terms.h reads. A part holds the serving form of one packed matrix and no more."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.native import packing
from deltaserve_kernels.native.library import Arena
from deltaserve_kernels.terms import Codebook, Coded, Exact, LowRank, Patches, Placed, Rotated, Rotation, Term
from deltaserve_kernels.terms.books import seeded_signs, seeded_size
from deltaserve_kernels.terms.masks import SeededMask
from deltaserve_kernels.terms.rotated import block_matrix

CHUNK = 64  # rows that src/chunks.c takes at once
LARGEST_BLOCK = {"in": 1024, "out": 64}  # of a transform
BOUND_PROJECTION = 2**18  # floats for a row of activations and a book: 256 rows at once
PLACE_BITS = 16  # of a place in a book


class Kind(IntEnum):
    BASE_SCALE = 0
    CODED = 1
    DENSE = 2
    SPARSE = 3
    BOOK = 4
    GRID = 5
    PATCHES = 6
    VECTOR = 7
    SHARED = 8


_TRANSFORMS = {"hadamard": 1, "dct": 2}
_NUMBERS = (
    "kind", "first", "rows", "cols", "bits", "value_bits", "group", "length", "tile", "stages", "segments", "survivors",
    "size", "transforms", "is_signed", "t_in", "t_in_size", "t_out", "t_out_size", "input", "turns",
)  # fmt: skip
_POINTERS = (
    "codes", "table", "row", "col", "group_scale", "values", "signs", "gains", "dct_in", "dct_in_tail", "dct_out",
    "dct_out_tail", "starts", "columns", "row_levels", "col_levels", "before",
)  # fmt: skip
_SHARED = {"signs", "dct_in", "dct_in_tail", "dct_out", "dct_out_tail"}  # by all deltas


class CPart(ctypes.Structure):
    """struct Part."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@dataclass(frozen=True)
class Part:
    """Numbers and tensors of struct Part, under its names; the tensors must outlive every CPart made of it."""

    kind: Kind
    rows: int
    cols: int
    numbers: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    before: Part | None = None

    def structure(self, first: int = 0, gamma: float = 1.0, input_of: int = 0) -> CPart:
        """For rows `first` … of a site, in a list whose part `input_of` makes its input. It points into this part."""
        pointers: dict[str, Any] = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        if self.before is not None:
            inner = self.before.structure()
            pointers["before"] = ctypes.addressof(inner)
        numbers = dict(self.numbers, kind=self.kind, rows=self.rows, cols=self.cols, first=first, input=input_of)
        structure = CPart(**numbers, **pointers, scale=self.scale * gamma)
        structure.kept = inner if self.before is not None else None
        return structure

    def reads_as(self, other: Part) -> bool:
        """Is what it makes of a layer's input the same?"""
        numbers = (
            "length", "tile", "segments", "size", "transforms", "turns", "bits", "is_signed", "t_in", "t_in_size",
        )  # fmt: skip
        mine, theirs = (
            (part.kind in (Kind.BOOK, Kind.SPARSE) and part.kind, part.cols, [part.numbers.get(n) for n in numbers])
            for part in (self, other)
        )
        if Kind.PATCHES in (self.kind, other.kind) or self.before or other.before or mine != theirs:
            return False
        return all(
            _same(self.tensors.get(name), other.tensors.get(name)) for name in ("col", "col_levels", "columns", "signs")
        )

    @property
    def arena_bytes(self) -> int:
        """At most, of an arena that takes it."""
        return self.nbytes + 64 * len(self.tensors) + (64 * len(self.before.tensors) if self.before else 0)

    def moved(self, arena: Arena) -> Part:
        """With its own tensors in `arena`."""
        tensors = {name: t if name in _SHARED else arena.take(t) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, before=self.before and self.before.moved(arena))

    @property
    def nbytes(self) -> int:
        """Of its own tensors; what all deltas share is not counted."""
        own = sum(tensor.nbytes for name, tensor in self.tensors.items() if name not in _SHARED)
        return own + (self.before.nbytes if self.before else 0)


def part_of(term: Term) -> Part | None:
    """The part that serves `term`; None for a form that these kernels do not read."""
    match term:
        case Coded():
            if isinstance(term.mask, SeededMask) and term.mask.tile % CHUNK == 0:
                return _shared(term, term.mask)
            return _sparse(term) if term.mask is not None else _coded(term)
        case LowRank():
            return _low_rank(term)
        case Codebook():
            return _book(term) if term.book.kind == "seeded" else _grid(term)
        case Patches():
            return _patches(term)
        case Placed():
            return _placed(term)
        case Rotated():
            return _rotated(term)
        case Exact():
            return _coded(term.serving())


def base_scale(rows: int, scale: float, factors: Tensor | None) -> Part:
    """y *= scale · factors, [rows] or None: 1."""
    return Part(Kind.BASE_SCALE, rows, 0, scale=scale, tensors={} if factors is None else {"row": _floats(factors)})


def vector(values: Tensor) -> Part:
    """y += values [rows]."""
    return Part(Kind.VECTOR, len(values), 0, tensors={"row": _floats(values)})


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _floats(tensor: Tensor) -> Tensor:
    return tensor.detach().float().flatten().contiguous().clone()


def _at_least(length: int, table: Tensor) -> Tensor:
    """Padded with zeros that no code stands for."""
    return F.pad(table, (0, max(0, length - len(table))))


def _row(part: Part, scale: Tensor | None) -> Part:
    """With scales of rows, [] or [rows, 1]."""
    if scale is None:
        return part
    if scale.numel() == 1:
        return replace(part, scale=float(scale))
    return replace(part, tensors=part.tensors | {"row": _floats(scale)})


def _column(part: Part, scale: Tensor | None) -> Part:
    return part if scale is None else replace(part, tensors=part.tensors | {"col": _floats(scale)})


def _levels(name: str, values: Tensor) -> dict[str, Tensor]:
    """`values` as a table of 16 and a byte for each; as they are where there are more of them."""
    table, places = torch.unique(_floats(values), return_inverse=True)
    if len(table) > 16:
        return {name: _floats(values)}
    return {name: _at_least(16, table), f"{name}_levels": places.to(torch.uint8)}


def _coded(term: Coded) -> Part | None:
    if term.grid == "float":
        return _dense(term)
    if term.bits > 8 or (term.group is not None and term.group % 2):
        return None
    codes = layout.unpack(term.codes, term.bits, term.cols)
    tensors = {
        "codes": packing.lanes(packing.tiles(codes), term.bits),
        "table": _at_least(32, term.levels(torch.float32)).bfloat16(),
    }
    numbers = {"bits": term.bits}
    row = term.row
    if term.group is not None and row is not None and row.dim() == 2 and row.shape[1] > 1:
        padded = F.pad(row.float(), (0, 0, 0, -term.rows % 32)).view(-1, 32, row.shape[1]).mT.contiguous()
        tensors["group_scale"], numbers["group"], row = padded, min(term.group, term.cols), None
    return _column(_row(Part(Kind.CODED, term.rows, term.cols, numbers, tensors), row), term.col)


def _dense(term: Coded) -> Part | None:
    """Values of 32 bits as two of bfloat16, whose sum has 16 bits of mantissa."""
    if term.group is not None:
        return None
    high = term.codes.bfloat16()
    stages = [high]
    if not torch.equal(high.float(), term.codes.float()):
        stages.append((term.codes.float() - high.float()).bfloat16())
    packed = torch.stack([packing.tiles(stage) for stage in stages]).contiguous()
    part = Part(Kind.DENSE, term.rows, term.cols, {"stages": len(stages)}, {"table": packed})
    return _column(_row(part, term.row), term.col)


def _shared(term: Coded, mask: SeededMask) -> Part | None:
    """What is left of each tile, as a matrix without a mask, and its columns."""
    inner = _coded(replace(term, cols=term.num_codes, mask=None, columns=None))
    if inner is None:
        return None
    columns = mask.columns(term.rows, term.cols)[:: mask.tile].int().contiguous()
    numbers = inner.numbers | {"tile": mask.tile, "survivors": term.num_codes}
    return replace(
        inner, kind=Kind.SHARED, cols=term.cols, numbers=numbers, tensors=inner.tensors | {"starts": columns}
    )


def _sparse(term: Coded) -> Part | None:
    """Survivors as places within their groups, drawn once; nothing of a mask but its places is kept."""
    assert term.mask is not None
    place_bits = max(1, (min(term.mask.group, term.cols) - 1).bit_length())
    if term.grid == "float" or place_bits + term.bits > layout.MAX_BITS:
        return None
    columns = term.mask.columns(term.rows, term.cols)
    starts = term.mask.group_of(term.cols) * term.mask.group
    entries = (columns - starts) << term.bits | layout.unpack(term.codes, term.bits, term.num_codes).long()
    bits = place_bits + term.bits
    tensors = {
        "codes": packing.lanes(packing.by_sixteen(entries), bits),
        "starts": starts.int(),
        "values": _at_least(16, term.levels(torch.float32)),
    }
    numbers = {"bits": bits, "value_bits": term.bits, "survivors": term.num_codes}
    return _column(_row(Part(Kind.SPARSE, term.rows, term.cols, numbers, tensors), term.row), term.col)


def _low_rank(term: LowRank) -> Part | None:
    left, right = part_of(term.left), part_of(term.right)
    if left is None or right is None or right.kind not in (Kind.CODED, Kind.DENSE, Kind.SPARSE, Kind.SHARED):
        return None
    scale = term.s.float() if term.left.col is None else term.s.float() * term.left.col.float()
    return replace(_column(left, scale), before=right)


def _book(term: Codebook) -> Part | None:
    width = term.tile * term.length
    signs = seeded_signs(term.book.stream, term.table_bits, width, "cpu")
    if term.segments * term.tile * signs.numel() > BOUND_PROJECTION or term.table_bits > PLACE_BITS:
        return None
    codes = layout.unpack(term.codes, term.bits, term.stages * term.tiles * term.segments)
    by_tile = codes.view(term.stages, term.tiles, term.segments).movedim(1, 0)  # [tiles, stages, segments]
    tensors = {"codes": packing.lanes(packing.by_sixteen(by_tile), term.bits), "signs": signs.contiguous()}
    if term.gains is not None:
        tensors["gains"] = _floats(term.gains)
    size = seeded_size(width)
    numbers = {
        "bits": term.bits, "is_signed": int(term.signed), "length": term.length, "tile": term.tile,
        "stages": term.stages, "segments": term.segments, "size": size, "transforms": len(signs), "turns": term.turns,
    }  # fmt: skip
    row, col = term.row_scales() / size**0.5, term.column_scales()
    if row.numel() > 1:
        tensors |= _levels("row", row)
    if col is not None:
        tensors |= _levels("col", col)
    return Part(Kind.BOOK, term.rows, term.cols, numbers, tensors, 1.0 if row.numel() > 1 else float(row))


def _grid(term: Codebook) -> Part | None:
    if term.tile != 1 or term.signed or term.stages != 1:
        return None
    table = term.table().flatten().bfloat16()
    codes = layout.unpack(term.codes, term.bits, term.rows * term.segments).view(term.rows, term.segments)
    if term.length == 1 and term.bits <= 8:  # a table of numbers
        tensors = {"codes": packing.lanes(packing.tiles(codes), term.bits), "table": _at_least(32, table)}
        part = Part(Kind.CODED, term.rows, term.cols, {"bits": term.bits}, tensors)
    else:
        tensors = {"codes": packing.lanes(packing.by_sixteen(codes), term.bits), "table": F.pad(table, (0, 2))}
        numbers = {"bits": term.bits, "length": term.length, "segments": term.segments}
        part = Part(Kind.GRID, term.rows, term.cols, numbers, tensors)
    return _column(_row(part, term.row_scales()), term.column_scales())


def _patches(term: Patches) -> Part | None:
    if term.size not in (16, 32):
        return None
    down, across = term.grid_shape
    places = term.places()
    codes = layout.unpack(term.codes, term.bits, term.size**2).view(-1, term.size // 16, 16, term.size // 2, 2)
    table = 2 * torch.arange(2**term.bits) - (2**term.bits - 1)
    counts = torch.bincount(places // across, minlength=down)
    tensors = {
        "codes": packing.lanes(codes.permute(0, 1, 3, 2, 4).flatten(-2), term.bits),
        "table": _at_least(32, table).bfloat16(),
        "gains": _floats(term.scale),
        "columns": (places % across).int(),
        "starts": F.pad(counts.cumsum(0), (1, 0)).int(),
    }
    numbers = {"bits": term.bits, "length": term.size}
    return Part(Kind.PATCHES, term.rows, term.cols, numbers, tensors)


def _placed(term: Placed) -> Part | None:
    inner = part_of(term.term)
    if inner is None or inner.kind == Kind.PATCHES or inner.before is not None or "columns" in inner.tensors:
        return None
    return replace(inner, tensors=inner.tensors | {"columns": term.places().int()})


def _rotated(term: Rotated) -> Part | None:
    inner = part_of(term.term)
    if inner is None or inner.before is not None:
        return None
    # What a part does to x before T_in, and the term after it.
    before_x = {"col"} if inner.kind == Kind.PATCHES else {"col", "columns"}
    if term.t_in is not None and before_x & inner.tensors.keys():
        return None
    numbers, tensors = dict(inner.numbers), dict(inner.tensors)
    for side, rotation, length in (("in", term.t_in, term.cols), ("out", term.t_out, term.rows)):
        if rotation is None:
            continue
        if rotation.size > LARGEST_BLOCK[side] or (side == "out" and LARGEST_BLOCK[side] % rotation.size):
            return None
        if side == "out" and "row" in tensors:
            return None  # rows are scaled before they are turned back
        numbers |= {f"t_{side}": _TRANSFORMS[rotation.kind], f"t_{side}_size": rotation.size}
        tensors |= dict(_matrices(rotation, side, length))
    return replace(inner, numbers=numbers, tensors=tensors)


def _matrices(rotation: Rotation, side: str, length: int) -> Iterator[tuple[str, Tensor]]:
    if rotation.kind == "hadamard":
        return
    yield f"dct_{side}", _both_ways(rotation.size)
    if length % rotation.size:
        yield f"dct_{side}_tail", _both_ways(length % rotation.size)


@cache
def _both_ways(size: int) -> Tensor:
    """float32 [2, size, size]: T and its transpose."""
    matrix = block_matrix("dct", size, torch.float32, "cpu")
    return torch.stack((matrix, matrix.T)).contiguous()
