"""Specs of terms around a term."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deltaserve.deltas.specs.base import BYTES, Layout, Positive, Read, Strict, nested, oversized, within
from deltaserve.deltas.specs.blocks import CodebookSpec, PatchesSpec
from deltaserve.deltas.specs.coded import CodedSpec
from deltaserve_kernels import layout
from deltaserve_kernels.terms import Codebook, Coded, Patches, Placed, Rotated, Rotation

MAX_DCT = 256  # a matrix [size, size] for each size in use: of all sizes up to this 23 MB


class PlacedSpec(Strict):
    """terms.Placed."""

    kind: Literal["placed"] = "placed"
    term: CodedSpec | CodebookSpec = Field(discriminator="kind")
    cols: Positive
    block: Positive

    @classmethod
    def of(cls, term: Placed) -> PlacedSpec:
        return cls(term=_inner(term.term), cols=term.cols, block=term.block)  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        return self.term.rows

    def layout(self) -> Layout:
        blocks = -(-self.cols // self.block)
        return {**nested("term", self.term.layout()), "present": ((layout.packed_bytes(blocks, 1),), BYTES)}

    def build(self, read: Read, seed: int, site: int) -> Placed:
        return Placed(self.term.build(within("term", read), seed, site), self.cols, self.block, read("present"))

    def problems(self) -> list[str]:
        found = self.term.problems() + oversized("blocks", self.block, self.cols)
        return found + ([f"{self.term.cols} of {self.cols} columns"] if self.term.cols > self.cols else [])

    def derived_bytes(self) -> int:
        return self.term.derived_bytes() + 8 * self.term.cols


class RotationSpec(Strict):
    """terms.Rotation."""

    kind: Literal["hadamard", "dct"]
    size: Annotated[int, Field(ge=1, le=4096)]

    def problems(self) -> list[str]:
        if self.kind == "dct":
            return [f"dct of size {self.size}, at most {MAX_DCT}"] if self.size > MAX_DCT else []
        return [f"hadamard of size {self.size}, no power of two"] if self.size & (self.size - 1) else []


class RotatedSpec(Strict):
    """terms.Rotated."""

    kind: Literal["rotated"] = "rotated"
    term: CodedSpec | CodebookSpec | PatchesSpec = Field(discriminator="kind")
    t_in: RotationSpec | None = None
    t_out: RotationSpec | None = None

    @classmethod
    def of(cls, term: Rotated) -> RotatedSpec:
        rotations = {
            name: RotationSpec(kind=rotation.kind, size=rotation.size)
            for name, rotation in (("t_in", term.t_in), ("t_out", term.t_out))
            if rotation
        }
        return cls(term=_inner(term.term), **rotations)  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        return self.term.rows

    @property
    def cols(self) -> int:
        return self.term.cols

    def layout(self) -> Layout:
        return nested("term", self.term.layout())

    def build(self, read: Read, seed: int, site: int) -> Rotated:
        rotations = [Rotation(spec.kind, spec.size) if spec else None for spec in (self.t_in, self.t_out)]
        return Rotated(self.term.build(within("term", read), seed, site), *rotations)

    def problems(self) -> list[str]:
        rotations = [spec for spec in (self.t_in, self.t_out) if spec]
        return self.term.problems() + [problem for spec in rotations for problem in spec.problems()]

    def derived_bytes(self) -> int:
        return self.term.derived_bytes()


def _inner(term: object) -> CodedSpec | CodebookSpec | PatchesSpec:
    match term:
        case Coded():
            return CodedSpec.of(term)
        case Codebook():
            return CodebookSpec.of(term)
        case Patches():
            return PatchesSpec.of(term)
    raise TypeError(f"a {type(term).__name__} is not wrapped")
