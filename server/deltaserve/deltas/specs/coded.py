"""Specs of coded matrices and low-rank products of them."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from deltaserve.deltas.specs.base import (
    BYTES,
    SINGLE_FLOATS,
    VECTOR_FLOATS,
    Layout,
    Positive,
    Read,
    Strict,
    nested,
    oversized,
    within,
)
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Coded, ExplicitMask, Grid, LowRank, SeededMask
from deltaserve_kernels.terms.masks import GroupMask, place_bits


class MaskSpec(Strict):
    """terms.SeededMask or ExplicitMask; the seed is the artifact's, the site follows from the tensor's name."""

    kind: Literal["seeded", "explicit"] = "seeded"
    group: Annotated[int, Field(ge=1, le=2**16)]
    keep: Annotated[int, Field(ge=1, le=2**16)] = 1
    stream: Annotated[int, Field(ge=0, lt=2**32)] = 0
    tile: Annotated[int, Field(ge=1, le=2**10)] = 1

    @classmethod
    def of(cls, mask: SeededMask | ExplicitMask) -> MaskSpec:
        if isinstance(mask, ExplicitMask):
            return cls(kind="explicit", group=mask.group, keep=mask.keep)
        return cls(group=mask.group, keep=mask.keep, stream=mask.stream, tile=mask.tile)

    def survivors(self, cols: int) -> int:
        return GroupMask(self.group, keep=self.keep).num_survivors(cols)

    def build(self, read: Read, seed: int, site: int) -> SeededMask | ExplicitMask:
        if self.kind == "explicit":
            return ExplicitMask(self.group, read("mask.places"), keep=self.keep)
        return SeededMask(self.group, seed, site, keep=self.keep, stream=self.stream, tile=self.tile)


class CodedSpec(Strict):
    """terms.Coded."""

    kind: Literal["coded"] = "coded"
    rows: Positive
    cols: Positive
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    grid: Grid
    row: Literal["tensor", "row", "group"] | None = None
    col: bool = False
    mask: MaskSpec | None = None
    group: Positive | None = None

    @classmethod
    def of(cls, term: Coded) -> CodedSpec:
        scale = None if term.row is None else "tensor" if term.row.dim() == 0 else "group" if term.group else "row"
        return cls(
            rows=term.rows,
            cols=term.cols,
            bits=term.bits,  # type: ignore[arg-type]  # checked by pydantic
            grid=term.grid,
            row=scale,  # type: ignore[arg-type]
            col=term.col is not None,
            mask=MaskSpec.of(term.mask) if term.mask else None,
            group=term.group,
        )

    @property
    def num_codes(self) -> int:
        return self.mask.survivors(self.cols) if self.mask else self.cols

    def layout(self) -> Layout:
        if self.bits >= 16:
            types = (torch.float32,) if self.bits == 32 else (torch.bfloat16, torch.float16)
            named: Layout = {"codes": ((self.rows, self.num_codes), types)}
        else:
            named = {"codes": ((self.rows, layout.packed_bytes(self.num_codes, self.bits)), BYTES)}
        if self.row is not None:
            groups = -(-self.cols // (self.group or self.cols))
            named["row"] = ((), SINGLE_FLOATS) if self.row == "tensor" else ((self.rows, groups), VECTOR_FLOATS)
        if self.col:
            named["col"] = ((self.cols,), VECTOR_FLOATS)
        if self.grid == "table":
            named["table"] = ((2**self.bits,), (torch.float32,))
        if self.mask and self.mask.kind == "explicit":
            width = layout.packed_bytes(self.num_codes, place_bits(self.mask.group))
            named["mask.places"] = ((self.rows, width), BYTES)
        return named

    def build(self, read: Read, seed: int, site: int) -> Coded:
        return Coded(
            rows=self.rows,
            cols=self.cols,
            bits=self.bits,
            grid=self.grid,
            codes=read("codes"),
            row=read("row") if self.row else None,
            col=read("col") if self.col else None,
            mask=self.mask.build(read, seed, site) if self.mask else None,
            group=self.group,
            table=read("table") if self.grid == "table" else None,
        )

    def problems(self) -> list[str]:
        found = []
        if (self.grid == "sign") != (self.bits == 1 and self.grid != "table") or (self.grid == "float") != (
            self.bits >= 16
        ):
            found.append(f"grid {self.grid!r} has no {self.bits}-bit codes")
        if (self.row == "group") != (self.group is not None):
            found.append("scales of groups and the size of a group go together")
        if self.mask and self.group:
            found.append("scales of groups under a mask")
        if self.mask and self.mask.keep > self.mask.group:
            found.append(f"{self.mask.keep} survivors in groups of {self.mask.group}")
        for what, size in (("scales of groups", self.group), ("a mask of groups", self.mask and self.mask.group)):
            found += oversized(what, size or 1, self.cols)
        return found

    def derived_bytes(self) -> int:
        """The mask, spelled out."""
        return self.rows * self.num_codes * (2 if self.cols <= 2**15 else 4) if self.mask else 0


class LowRankSpec(Strict):
    """terms.LowRank."""

    kind: Literal["low-rank"] = "low-rank"
    left: CodedSpec
    right: CodedSpec

    @classmethod
    def of(cls, term: LowRank) -> LowRankSpec:
        return cls(left=CodedSpec.of(term.left), right=CodedSpec.of(term.right))

    @property
    def rows(self) -> int:
        return self.left.rows

    @property
    def cols(self) -> int:
        return self.right.cols

    def layout(self) -> Layout:
        return {
            **nested("left", self.left.layout()),
            "s": ((self.left.cols,), (torch.float32,)),
            **nested("right", self.right.layout()),
        }

    def build(self, read: Read, seed: int, site: int) -> LowRank:
        left = self.left.build(within("left", read), seed, site)
        return LowRank(left, read("s"), self.right.build(within("right", read), seed, site))

    def problems(self) -> list[str]:
        found = [f"left: {p}" for p in self.left.problems()] + [f"right: {p}" for p in self.right.problems()]
        rank = self.left.cols
        if rank != self.right.rows:
            found.append(f"rank {rank} of the left factor, {self.right.rows} of the right one")
        return found + (
            [f"rank {rank} is over {min(self.rows, self.cols)}"] if rank > min(self.rows, self.cols) else []
        )

    def derived_bytes(self) -> int:
        return self.left.derived_bytes() + self.right.derived_bytes()
