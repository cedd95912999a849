"""Terms → parts: what the fused kernels read. Made once, on the host, when a delta is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.fused import slots
from deltaserve_kernels.terms import Book, Codebook, Coded, Exact, LowRank, Patches, Placed, Rotated, Rotation, Term
from deltaserve_kernels.terms.books import seeded_size

LANES = 32  # of a slot: two bytes of x for each thread of a block of 128, the least that is loaded asynchronously
GROUPS = (128, 64, 32)  # columns that may share a scale: what the kernel is compiled for
PATCH_SIZES = (16, 32)
MAX_ENTRY_BITS = 24
MAX_PROJECTION = 2**22  # float16 numbers for a row of activations and a book


@dataclass(frozen=True)
class InputForm:
    """What a part makes of a layer's input: turned, columns picked, each multiplied by a number; in this order."""

    rotation: Rotation | None = None
    columns: Tensor | None = None
    col: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.rotation is None and self.columns is None and self.col is None


@dataclass(frozen=True)
class BookForm:
    """A book as it is projected on: C[index][r · length + j] for r < tile."""

    book: Book
    index_bits: int  # of places in the book
    tile: int
    length: int
    segments: int

    @property
    def size(self) -> int:
        """Of a transform."""
        return seeded_size(self.tile * self.length)

    @property
    def width(self) -> int:
        """Products of a row of activations."""
        return self.segments * self.tile << self.index_bits

    @property
    def shift(self) -> int:
        """|P| ≤ 2^13 · √(size · length) ≤ 2^(13 + shift): P is kept as P · 2^−shift, in float16."""
        return math.ceil(math.log2(self.size * self.length) / 2)


@dataclass(frozen=True)
class FusedPart:
    """Tensors go into the delta's memory, under the names of the offsets that will point to them."""

    kind: str  # codes, gather, grid, patches, rescale, vector
    rows: int
    about: int | BookForm = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    scale: float = 1.0
    zero: float = 0.0
    form: InputForm = InputForm()
    turned: Rotation | None = None
    rank: int = 0  # of a factor: columns it takes among those between, padded
    phase: int = 1

    def scaled(self, factor: float) -> FusedPart:
        return replace(self, scale=self.scale * factor)


@dataclass(frozen=True)
class FusedTerm:
    """The parts of one term; the second factor of each low-rank pair follows its first."""

    parts: tuple[FusedPart, ...]

    @property
    def nbytes(self) -> int:
        forms = [part.form for part in self.parts]
        tensors = [tensor for part in self.parts for tensor in part.tensors.values()]
        tensors += [tensor for form in forms for tensor in (form.columns, form.col) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)


def fused_term(term: Term) -> FusedTerm | None:
    """None for a form that these kernels do not read."""
    parts = _parts(term)
    return None if parts is None else FusedTerm(tuple(parts))


def written_as(part: FusedPart) -> str | None:
    """What a part is to `materialize`: codes, gather, factors, rescale; None for what it does not read: books, grids,
    patches, rotations, columns that are picked."""
    plain = part.turned is None and part.form.rotation is None and part.form.columns is None
    if not plain or isinstance(part.about, BookForm) or part.kind not in ("codes", "gather", "rescale"):
        return None
    return "factors" if part.rank else part.kind


def rescale(rows: int, scale: float, factors: Tensor | None) -> FusedTerm:
    """y ← (y − b) · scale · factors [rows] + b, before anything is added."""
    part = FusedPart("rescale", rows, scale=scale, phase=0)
    return FusedTerm((part if factors is None else _row(part, factors),))


def vector(values: Tensor) -> FusedTerm:
    """values [n], which take the place of a module's: as bfloat16 where they are such numbers, as float32 otherwise."""
    values = values.detach().float().contiguous()
    short = values.bfloat16()
    stored = F.pad(short, (0, len(short) % 2)) if torch.equal(short.float(), values) else values
    numbers = {"BITS": 8 * stored.element_size()}
    return FusedTerm((FusedPart("vector", len(values), 0, {"values": stored.view(torch.int32)}, numbers),))


def _parts(term: Term) -> list[FusedPart] | None:
    match term:
        case Coded():
            if term.mask is not None:
                return _sparse(term)
            return _dense(term) if term.grid == "float" else _coded(term)
        case LowRank():
            return _low_rank(term)
        case Codebook():
            return _book(term) if term.book.kind == "seeded" else _grid(term)
        case Patches():
            return _patches(term)
        case Placed():
            return _formed(_parts(term.term), InputForm(columns=term.places().int()))
        case Rotated():
            parts = _parts(term.term)
            if parts is not None and term.t_in is not None:
                parts = _formed(parts, InputForm(rotation=term.t_in))
            if parts is None or term.t_out is None:
                return parts
            last = [replace(part, turned=term.t_out) if part.phase != 2 else part for part in parts]
            return last if all(part.turned in (None, term.t_out) for part in parts) else None
        case Exact():
            return _parts(term.serving())


def _formed(parts: list[FusedPart] | None, form: InputForm) -> list[FusedPart] | None:
    """`form` comes before what the parts already make of their input."""
    made: list[FusedPart] = []
    for part in parts or []:
        own = part.form
        if part.phase == 3:
            made.append(part)
            continue
        if own.rotation is not None or (own.columns is not None and form.columns is not None):
            return None
        columns = form.columns if own.columns is None else own.columns
        made.append(replace(part, form=InputForm(form.rotation, columns, own.col)))
    return None if parts is None else made


def _floats(tensor: Tensor) -> Tensor:
    return tensor.detach().float().flatten().contiguous()


def _row(part: FusedPart, scale: Tensor | None) -> FusedPart:
    """With scales of rows, [] or [rows, 1], beside those it has."""
    if scale is None:
        return part
    if scale.numel() == 1:
        return part.scaled(float(scale))
    own = part.tensors.get("row")
    values = _floats(scale) if own is None else own * _floats(scale)
    return replace(part, tensors=part.tensors | {"row": values})


def _column(part: FusedPart, scale: Tensor | None) -> FusedPart:
    return part if scale is None else replace(part, form=replace(part.form, col=_floats(scale)))


def _coded(term: Coded) -> list[FusedPart] | None:
    """A part for each plane of 4, 2 or 1 bits: centred codes are Σ 2^low · (plane − its middle)."""
    if term.grid == "table":
        return _table(term)
    codes = layout.unpack(term.codes, term.bits, term.cols).int()
    unit, middle = (1.0, 0.5) if term.grid == "int" else (2.0, 0.0)
    group, row = term.group, term.row
    grouped = group is not None and row is not None and row.dim() == 2 and row.shape[1] > 1
    common = next((size for size in GROUPS if group is not None and group % size == 0), 0)
    if grouped and not common:
        return None
    parts, low = [], 0
    for width in [4] * (term.bits // 4) + [width for width in (2, 1) if term.bits & width]:
        plane = (codes >> low & (1 << width) - 1).to(torch.uint8)
        packed = slots.pack_slots(plane, width, LANES)
        zero = (2**width - 1) / 2 + (middle if not low else 0)
        numbers = {"BITS": width, "COUNT": packed.shape[1]}
        part = FusedPart("codes", term.rows, 0, {"codes": packed}, numbers, unit * 2**low, zero)
        if grouped:
            assert row is not None
            assert group is not None
            part = _grouped(part, row.float().repeat_interleave(group // common, 1), common, packed.shape[1], width)
        else:
            part = _row(part, row)
        parts.append(_column(part, term.col))
        low += width
    return parts


def _grouped(part: FusedPart, scales: Tensor, group: int, superblocks: int, bits: int) -> FusedPart:
    """Scales float32 [rows, groups] in the order of the row tiles, for every group that a superblock begins."""
    groups = -(-superblocks * slots.superblock(bits, LANES) // group)
    scales = F.pad(scales[:, :groups], (0, max(0, groups - scales.shape[1]), 0, -len(scales) % slots.ROW_TILE))
    tiled = scales.view(-1, slots.ROW_TILE, groups).mT.contiguous()
    return replace(
        part,
        about=group,
        tensors=part.tensors | {"group_scale": tiled},
        numbers=part.numbers | {"TILE": groups, "INDEX_BITS": group},
    )


def _dense(term: Coded) -> list[FusedPart] | None:
    """Values as float16 of a row's largest, which is exact for bfloat16 down to 2^−16 of it; 32 bits in two parts."""
    if term.group is not None:
        return None
    values = term.codes.float()
    peak = values.abs().amax(1, keepdim=True)
    unit = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent)
    parts, rest = [], values / unit
    for _ in range(1 if term.bits == 16 else 2):
        high = rest.half()
        packed = slots.pack_values(high, LANES)
        part = FusedPart("codes", term.rows, 0, {"codes": packed}, {"BITS": 16, "COUNT": packed.shape[1]})
        parts.append(_column(_row(_row(part, unit), term.row), term.col))
        rest, unit = (rest - high.float()) * 2**11, unit * 2**-11
    return parts


def _sparse(term: Coded) -> list[FusedPart] | None:
    """Entries: place within the group, and above it the value's code, or a bfloat16 itself."""
    assert term.mask is not None
    columns = term.mask.columns(term.rows, term.cols)
    origin = term.mask.group_of(term.cols) * term.mask.group
    places = columns - origin
    index_bits = max(1, int(places.max()).bit_length()) if places.numel() else 1
    if term.grid == "float":
        if not torch.equal(term.codes.bfloat16().float(), term.codes.float()):
            return None
        values, bits = term.codes.bfloat16().view(torch.int16).long() & 0xFFFF, 16
        tensors = {}
    else:
        values, bits = layout.unpack(term.codes, term.bits, term.num_codes).long(), term.bits
        tensors = {"values": term.levels(torch.float32)}
    if index_bits + bits > MAX_ENTRY_BITS:
        return None
    starts = torch.stack((origin, torch.zeros_like(origin)), 1).int()
    packed = slots.pack_entries(values << index_bits | places, index_bits + bits)
    numbers = {"BITS": index_bits + bits, "INDEX_BITS": index_bits, "COUNT": term.num_codes, "TILE": 1}
    part = FusedPart("gather", term.rows, 0, {"codes": packed, "starts": starts, **tensors}, numbers)
    return [_column(_row(part, term.row), term.col)]


def _low_rank(term: LowRank) -> list[FusedPart] | None:
    left, right = _parts(term.left), _parts(term.right)
    if left is None or right is None:
        return None
    scale = term.s.float() if term.left.col is None else term.s.float() * term.left.col.float()
    rank = slots.padded(max(term.right.rows, 1), slots.superblock(1, LANES))
    return [
        *(replace(_row(part, scale), phase=2, rank=rank) for part in right),
        *(replace(part, phase=3, form=InputForm(), rank=rank) for part in left),
    ]


def _book(term: Codebook) -> list[FusedPart] | None:
    form = BookForm(term.book, term.table_bits, term.tile, term.length, term.segments)
    if form.width > MAX_PROJECTION:
        return None
    codes = layout.unpack(term.codes, term.bits, term.stages * term.tiles * term.segments).long()
    by_tile = codes.view(term.stages, term.tiles, term.segments).movedim(1, 0).flatten(1)  # [tiles, entries]
    gains = torch.ones(term.stages) if term.gains is None else term.gains.float()
    values = torch.stack((gains, -gains), 1) if term.signed else gains[:, None]
    segment, part = torch.arange(term.segments) << term.table_bits, torch.arange(term.stages) % term.turns
    origin = (segment + (part << term.index_bits)[:, None]).flatten() * term.tile
    table = torch.arange(term.stages).repeat_interleave(term.segments) * values.shape[1]
    tensors = {
        "codes": slots.pack_entries(by_tile, term.bits),
        "starts": torch.stack((origin, table), 1).int(),
        "values": _floats(values),
    }
    numbers = {"BITS": term.bits, "INDEX_BITS": term.index_bits, "COUNT": by_tile.shape[1], "TILE": term.tile}
    made = FusedPart("gather", term.rows, form, tensors, numbers, scale=2.0**form.shift)
    return [_column(_row(made, term.row_scales()), term.column_scales())]


def _grid(term: Codebook) -> list[FusedPart] | None:
    if term.tile != 1 or term.signed or term.stages != 1:
        return None
    codes = layout.unpack(term.codes, term.bits, term.rows * term.segments).view(term.rows, term.segments)
    part = _vectors(codes, term.bits, term.table().flatten(1))
    return [_column(_row(part, term.row_scales()), term.column_scales())]


def _table(term: Coded) -> list[FusedPart] | None:
    if term.group is not None and term.row is not None and term.row.dim() == 2 and term.row.shape[1] > 1:
        return None
    part = _vectors(layout.unpack(term.codes, term.bits, term.cols), term.bits, term.levels(torch.float32)[:, None])
    return [_column(_row(part, term.row), term.col)]


def _vectors(codes: Tensor, bits: int, table: Tensor) -> FusedPart:
    """table float32 [2^bits, length], kept as float16 of its largest entry."""
    length = table.shape[1]
    unit = 2.0 ** torch.frexp(table.abs().max()).exponent.item()
    padded = F.pad(table / unit, (0, grid_padding(length) - length)).half()
    tensors = {"codes": slots.pack_entries(codes.int(), bits), "values": padded.contiguous()}
    return FusedPart("grid", len(codes), length, tensors, {"BITS": bits, "COUNT": codes.shape[1]}, scale=unit)


def grid_padding(length: int) -> int:
    """Numbers that a vector of a grid takes: a power of two."""
    return 1 << (length - 1).bit_length()


def _patches(term: Patches) -> list[FusedPart] | None:
    if term.size not in PATCH_SIZES or term.bits > 8:
        return None
    down, across = term.grid_shape
    places = term.places()
    codes = layout.unpack(term.codes, term.bits, term.size**2).int()
    tensors = {
        "codes": torch.cat(list(_planes(codes, term.bits)), 1).contiguous(),
        "group_scale": _floats(term.scale),
        "starts": F.pad(torch.bincount(places // across, minlength=down).cumsum(0), (1, 0)).int(),
        "values": (places % across).int(),
    }
    return [FusedPart("patches", term.rows, term.size, tensors, {"BITS": term.bits})]


def _planes(codes: Tensor, bits: int) -> Iterator[Tensor]:
    low = 0
    for width in slots.plane_widths(bits):
        yield layout.pack(codes >> low & (1 << width) - 1, width)
        low += width
