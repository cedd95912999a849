"""Specs of terms whose codes stand for blocks, and of streams."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from deltaserve.deltas.specs.base import BYTES, SINGLE_FLOATS, VECTOR_FLOATS, Layout, Positive, Read, Strict
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Book, Codebook, Exact, Patches
from deltaserve_kernels.terms.codebook import LEVEL_BITS

MAX_TABLE = 2**24  # entries of a codebook's table: 4 bytes each, shared by all that use it
MAX_PROJECTION = 2**24  # numbers that one token's products with a table take
MAX_PADDING = 2**20  # entries of patches that hang over the edge


class CodebookSpec(Strict):
    """terms.Codebook."""

    kind: Literal["codebook"] = "codebook"
    rows: Positive
    cols: Positive
    bits: Annotated[int, Field(ge=1, le=16)]
    length: Annotated[int, Field(ge=1, le=2**16)]
    tile: Annotated[int, Field(ge=1, le=2**10)] = 1
    signed: bool = True
    row: Literal["tensor", "row"] = "tensor"
    book: Literal["seeded", "gaussian"] = "seeded"
    stream: Annotated[int, Field(ge=0, lt=16)] = 0
    stages: Annotated[int, Field(ge=0, le=64)] = 0  # 0: one, without a gain
    turns: Literal[1, 2, 4, 8] = 1
    levels: bool = False
    boosts: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=8)] = []

    @property
    def index_bits(self) -> int:
        return self.bits - self.signed

    @property
    def table_bits(self) -> int:
        return self.index_bits + self.turns.bit_length() - 1

    @property
    def table_entries(self) -> int:
        return (self.tile * self.length) << self.table_bits

    @classmethod
    def of(cls, term: Codebook) -> CodebookSpec:
        return cls(
            rows=term.rows,
            cols=term.cols,
            bits=term.bits,
            length=term.length,
            tile=term.tile,
            signed=term.signed,
            row="tensor" if term.row.dim() == 0 else "row",
            book=term.book.kind,
            stream=term.book.stream,
            stages=0 if term.gains is None else len(term.gains),
            turns=term.turns,  # type: ignore[arg-type]
            levels=term.levels is not None,
            boosts=list(term.boosts),
        )

    def layout(self) -> Layout:
        blocks = -(-self.rows // self.tile) * -(-self.cols // self.length)
        codes = (layout.packed_bytes(blocks * max(1, self.stages), self.bits),)
        scale = ((), SINGLE_FLOATS) if self.row == "tensor" else ((self.rows, 1), VECTOR_FLOATS)
        named: Layout = {"codes": (codes, BYTES), "row": scale}
        if self.stages:
            named["gains"] = ((self.stages,), (torch.float32,))
        if self.levels:
            named["levels"] = ((layout.packed_bytes(self.rows, LEVEL_BITS),), BYTES)
        if self.boosts:
            index_type = torch.int16 if self.cols <= 2**15 else torch.int32
            named["boosted"] = ((sum(self.boosts),), (index_type,))
        return named

    def build(self, read: Read, seed: int, site: int) -> Codebook:  # noqa: ARG002 (one signature)
        return Codebook(
            self.rows,
            self.cols,
            self.bits,
            self.length,
            Book(self.book, self.stream),
            read("codes"),
            read("row"),
            self.tile,
            self.signed,
            gains=read("gains") if self.stages else None,
            levels=read("levels") if self.levels else None,
            boosted=read("boosted") if self.boosts else None,
            boosts=tuple(self.boosts),
            turns=self.turns,
        )

    def problems(self) -> list[str]:
        found = []
        if self.length > self.cols or self.tile > self.rows:
            found.append(f"blocks of {self.tile} × {self.length} in {self.rows} × {self.cols}")
        if self.index_bits < 1:
            return [*found, "a signed code of 1 bit has no index"]
        if self.table_entries > MAX_TABLE:
            found.append(f"a table of {self.table_entries} entries, at most {MAX_TABLE}")
        products = (self.tile * -(-self.cols // self.length)) << self.table_bits
        if products > MAX_PROJECTION:
            found.append(f"{products} products of a token with the table, at most {MAX_PROJECTION}")
        if self.turns > max(1, self.stages):
            found.append(f"{self.stages} stages that take turns at {self.turns} parts of a table")
        if self.book == "gaussian" and not Book("gaussian").exists(self.table_bits, self.tile * self.length):
            found.append(f"no gaussian book of {self.table_bits} bits for {self.tile * self.length} entries")
        return found

    def derived_bytes(self) -> int:
        return 0


class PatchesSpec(Strict):
    """terms.Patches; `count` of the patches are present."""

    kind: Literal["patches"] = "patches"
    rows: Positive
    cols: Positive
    size: Annotated[int, Field(ge=1, le=1024)]
    bits: Annotated[int, Field(ge=1, le=8)]
    count: Annotated[int, Field(ge=0, lt=2**40)]

    @classmethod
    def of(cls, term: Patches) -> PatchesSpec:
        return cls(rows=term.rows, cols=term.cols, size=term.size, bits=term.bits, count=len(term.scale))

    def layout(self) -> Layout:
        patches = -(-self.rows // self.size) * -(-self.cols // self.size)
        return {
            "codes": ((self.count, layout.packed_bytes(self.size**2, self.bits)), BYTES),
            "scale": ((self.count,), VECTOR_FLOATS),
            "present": ((layout.packed_bytes(patches, 1),), BYTES),
        }

    def build(self, read: Read, seed: int, site: int) -> Patches:  # noqa: ARG002
        return Patches(self.rows, self.cols, self.size, self.bits, read("codes"), read("scale"), read("present"))

    def problems(self) -> list[str]:
        whole = -(-self.rows // self.size) * -(-self.cols // self.size) * self.size**2
        if whole > 4 * self.rows * self.cols + MAX_PADDING:
            return [f"patches of {self.size} × {self.size} in {self.rows} × {self.cols}"]
        return []

    def derived_bytes(self) -> int:
        return 8 * self.count


class ExactSpec(Strict):
    """terms.Exact; the stream has `count` bytes."""

    kind: Literal["exact"] = "exact"
    rows: Positive
    cols: Positive
    value_bits: Literal[16, 32]
    count: Positive

    @classmethod
    def of(cls, term: Exact) -> ExactSpec:
        return cls(
            rows=term.rows,
            cols=term.cols,
            value_bits=term.value_bits,  # type: ignore[arg-type]
            count=len(term.stream),
        )

    def layout(self) -> Layout:
        return {"stream": ((self.count,), BYTES)}

    def build(self, read: Read, seed: int, site: int) -> Exact:  # noqa: ARG002
        return Exact(self.rows, self.cols, self.value_bits, read("stream"))

    def problems(self) -> list[str]:
        return []

    def derived_bytes(self) -> int:
        """Served as plain values, in place of the stream."""
        return self.rows * self.cols * self.value_bits // 8 - self.count
