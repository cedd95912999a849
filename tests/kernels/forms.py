"""Not tests: terms of every form that kernels read, of any shape. Deterministic.

`forms` have any scales; PRECISION says which tolerance is theirs where it is not "exact". `whole_forms` are of integers
and powers of two: their products with small integers are exact.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.terms import (
    Book,
    Codebook,
    Coded,
    Exact,
    ExplicitMask,
    Grid,
    LowRank,
    Patches,
    Placed,
    Rotated,
    Rotation,
    SeededMask,
    Term,
)
from deltaserve_kernels.terms.masks import GroupMask

GRIDS: list[tuple[Grid, int]] = [
    ("sign", 1), ("odd", 2), ("int", 3), ("odd", 4), ("int", 5), ("odd", 6), ("int", 7), ("odd", 8), ("int", 8)
]  # fmt: skip
MASKS = [(1, 8), (2, 4), (1, 37), (3, 16)]  # keep, group
GAUSSIAN = [(1, 4), (2, 6), (3, 7), (4, 8), (7, 8), (16, 8), (32, 8)]  # length, bits
PRECISION = {"float-32": "split", "exact": "split"} | dict.fromkeys(
    (
        "col", "mask-shared-by-64", "groups", "groups-odd-length", "table-4", "table-7", "factors", "factors-wide",
        "factors-sparse", "placed-col", "rotated-in", "rotated-in-dct", "rotated-patches-16", "rotated-patches-32",
    ),
    "rounded",
)  # fmt: skip


class Maker:
    """Terms of [rows, cols]; with `whole`, scales are powers of two."""

    def __init__(self, rows: int, cols: int, *, whole: bool = False) -> None:
        self.rows, self.cols, self.whole = rows, cols, whole
        self.generator = torch.Generator().manual_seed(1000 * rows + cols)

    def scales(self, *shape: int) -> Tensor:
        if self.whole:
            return 2.0 ** torch.randint(-2, 3, shape, generator=self.generator)
        return torch.rand(shape, generator=self.generator) + 0.5

    def codes(self, *shape: int, bits: int) -> Tensor:
        return layout.pack(torch.randint(2**bits, shape, generator=self.generator), bits)

    def values(self, *shape: int) -> Tensor:
        if self.whole:
            return torch.randint(-8, 9, shape, generator=self.generator).float()
        return torch.randn(shape, generator=self.generator)

    def coded(self, rows: int, cols: int, bits: int = 2, grid: Grid = "odd", **more: Any) -> Coded:
        mask: GroupMask | None = more.get("mask")
        count = mask.num_survivors(cols) if mask else cols
        return Coded(
            rows, cols, bits, grid, self.codes(rows, count, bits=bits), **{"row": self.scales(rows, 1), **more}
        )

    def book(self, bits: int, length: int, *, tile: int = 1, stages: int = 1, **more: Any) -> Codebook:
        blocks = stages * -(-self.rows // tile) * -(-self.cols // length)
        rest = {"gains": self.scales(stages) if stages > 1 else None, "book": Book("seeded"), **more}
        codes = self.codes(blocks, bits=bits)
        return Codebook(self.rows, self.cols, bits, length, codes=codes, row=self.scales(), tile=tile, **rest)

    def patches(self, size: int, bits: int) -> Patches:
        present = torch.arange(-(-self.rows // size) * -(-self.cols // size)) % 3 != 1
        count = int(present.sum())
        codes = self.codes(count, size**2, bits=bits)
        return Patches(self.rows, self.cols, size, bits, codes, self.scales(count), layout.pack(present, 1))

    def placed(self, block: int, **more: Any) -> Placed:
        """On every other block."""
        count = sum(min(block, self.cols - start) for start in range(0, self.cols, 2 * block))
        present = layout.pack(torch.arange(-(-self.cols // block)) % 2 == 0, 1)
        col = {"col": self.scales(count)} if more.pop("col", False) else {}
        return Placed(self.coded(self.rows, count, **more, **col), self.cols, block, present)

    def factors(self, rank: int, left: dict[str, Any], right: dict[str, Any]) -> LowRank:
        return LowRank(self.coded(self.rows, rank, **left), self.scales(rank), self.coded(rank, self.cols, **right))


@cache
def forms(rows: int, cols: int) -> dict[str, Term]:
    make = Maker(rows, cols)
    seeded = {f"mask-{keep}-of-{group}": SeededMask(group, 5, 9, keep=keep) for keep, group in MASKS}
    places = layout.pack(torch.arange(rows * -(-cols // 4)).view(rows, -1) % min(4, cols % 4 or 4), 2)
    boosted = torch.arange(0, cols, 3, dtype=torch.int16)
    half, shared = SeededMask(2, 5, 9), SeededMask(3, 5, 9, tile=128)
    return {
        **{f"{grid}-{bits}": make.coded(rows, cols, bits, grid) for grid, bits in GRIDS},
        "one-scale": make.coded(rows, cols, row=make.scales()),
        "no-scale": make.coded(rows, cols, row=None),
        "col": make.coded(rows, cols, col=make.scales(cols)),
        "table-4": make.coded(rows, cols, 4, "table", table=make.values(16)),
        "table-7": make.coded(rows, cols, 7, "table", table=make.values(128)),
        "groups": make.coded(rows, cols, row=make.scales(rows, -(-cols // 32)), group=32),
        "groups-odd-length": make.coded(rows, cols, row=make.scales(rows, -(-cols // 6)), group=6),
        "float-16": Coded(rows, cols, 16, "float", make.values(rows, cols).bfloat16()),
        "float-32": Coded(rows, cols, 32, "float", make.values(rows, cols), row=make.scales(rows, 1)),
        "exact": Exact.of(make.values(rows, cols)),
        **{name: make.coded(rows, cols, 2, mask=mask) for name, mask in seeded.items()},
        "mask-6-bits": make.coded(rows, cols, 6, "int", mask=seeded["mask-1-of-8"], col=make.scales(cols)),
        "mask-shared": make.coded(rows, cols, 1, "sign", mask=SeededMask(16, 5, 9, tile=8), row=make.scales()),
        "mask-explicit": make.coded(rows, cols, 5, mask=ExplicitMask(4, places)),
        "factors": make.factors(5, {"bits": 3}, {"bits": 4}),
        "factors-wide": make.factors(140, {"bits": 3, "col": make.scales(140)}, {"bits": 8}),
        "factors-sparse": make.factors(30, {"mask": half, "col": make.scales(30)}, {"mask": half}),
        "book": make.book(12, 44),
        "book-unsigned": make.book(7, 20, signed=False, book=Book("seeded", 3)),
        "book-stages": make.book(9, 131, stages=3, levels=make.codes(rows, bits=4)),
        "book-tile": make.book(10, 131, tile=3),
        "book-turns": make.book(9, 44, stages=5, turns=4),
        "book-turns-short": make.book(5, 131, tile=2, stages=3, turns=2),
        "book-large-tile": make.book(8, 33, tile=20, stages=2),
        "book-long": make.book(12, 131, tile=12),
        "book-boosted": make.book(12, 66, boosted=boosted, boosts=(len(boosted) - 1, 1)),
        "book-turned": Rotated(make.book(12, 131, tile=2), t_out=Rotation("hadamard", 64)),
        **{
            f"gaussian-{length}-{bits}": make.book(bits, length, signed=False, book=Book("gaussian"))
            for length, bits in GAUSSIAN
        },
        "placed": make.placed(32),
        "placed-one": make.placed(1, bits=4, grid="int"),
        "placed-col": make.placed(8, col=True),
        "rotated-in": Rotated(make.coded(rows, cols), t_in=Rotation("hadamard", 64)),
        "rotated-in-dct": Rotated(make.coded(rows, cols, row=make.scales()), Rotation("dct", 32), Rotation("dct", 16)),
        "rotated-patches-16": Rotated(make.patches(16, 2), Rotation("dct", 16), Rotation("dct", 16)),
        "rotated-patches-32": Rotated(make.patches(32, 3), Rotation("dct", 32), Rotation("dct", 32)),
        "patches": make.patches(16, 8),
        "mask-shared-by-64": make.coded(
            rows, cols, 3, mask=SeededMask(4, 5, 9, keep=2, tile=64), row=make.scales(rows, 1), col=make.scales(cols)
        ),
        "mask-shared-values": Coded(
            rows, cols, 16, "float", make.values(rows, shared.num_survivors(cols)).bfloat16(), mask=shared
        ),
    }  # fmt: skip


@cache
def whole_forms(rows: int, cols: int) -> dict[str, Term]:
    """`rows` 1 or a multiple of 4, `cols` a multiple of 16 up to 128: sums stay below 2^24, what is rounded to bfloat16
    within its 8 bits, and Hadamard blocks are of 4 or 1."""
    make = Maker(rows, cols, whole=True)
    four, small = Rotation("hadamard", 4), make.coded(rows, cols, 1, "sign", row=make.scales())
    return {
        **{f"{grid}-{bits}": make.coded(rows, cols, bits, grid, col=make.scales(cols)) for grid, bits in GRIDS[:-2]},
        "table": make.coded(rows, cols, 3, "table", table=make.values(8)),
        "groups": make.coded(rows, cols, row=make.scales(rows, -(-cols // 6)), group=6),
        "float": Coded(rows, cols, 32, "float", make.values(rows, cols), row=make.scales(rows, 1)),
        "mask": make.coded(rows, cols, 4, mask=SeededMask(8, 5, 9, keep=3), col=make.scales(cols)),
        "mask-shared": make.coded(rows, cols, 2, mask=SeededMask(8, 5, 9, keep=3, tile=64), col=make.scales(cols)),
        "factors": LowRank(
            make.coded(rows, 8, 1, "sign"),
            make.scales(8),
            make.coded(8, cols, 1, "sign", mask=SeededMask(8, 5, 9)),
        ),
        "book": make.book(6, 16),
        "book-tile": make.book(6, 4, tile=4, stages=2),
        "patches": make.patches(16, 3),
        "placed": make.placed(8, col=True),
        "rotated": Rotated(small, four, four),
    }


def activations(tokens: int, cols: int) -> Tensor:
    """bfloat16 [tokens, cols]"""
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def integers(tokens: int, cols: int) -> Tensor:
    """bfloat16 [tokens, cols] of −4 … 4"""
    return torch.randint(-4, 5, (tokens, cols), generator=torch.Generator().manual_seed(tokens)).bfloat16()
