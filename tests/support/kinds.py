"""A codec that is no compression at all: it answers any matrix with small random terms of every kind there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from deltaserve_kernels import layout
from deltaserve_kernels.terms import (
    Book,
    Codebook,
    Coded,
    Exact,
    ExplicitMask,
    LowRank,
    Patches,
    Placed,
    Rotated,
    Rotation,
    SeededMask,
    Term,
)
from deltaserve_kernels.terms.masks import GroupMask

if TYPE_CHECKING:
    from torch import Tensor

    from deltaserve.codecs.base import Site

SCALE = 0.01


@dataclass(frozen=True)
class EveryKind:
    needs_gram: ClassVar[bool] = False
    only: str | None = None  # one kind of `kinds`

    @property
    def name(self) -> str:
        return "every-kind"

    def config(self) -> dict[str, Any]:
        return {}

    def encode(self, delta: Tensor, site: Site) -> list[Term]:
        made = kinds(*delta.shape, seed=site.seed, site=site.number)
        return list(made.values()) if self.only is None else [made[self.only]]


def kinds(rows: int, cols: int, *, seed: int = 7, site: int = 1) -> dict[str, Term]:
    """Of at least 6 × 8, in the types that a packed artifact has. Deterministic."""
    generator = torch.Generator().manual_seed(site)

    def codes(count: tuple[int, ...], bits: int) -> Tensor:
        return layout.pack(torch.randint(2**bits, count, generator=generator), bits)

    def scales(*shape: int) -> Tensor:
        made = SCALE * (1 + torch.rand(shape, generator=generator))
        return made.bfloat16() if shape else made

    def coded(down: int, across: int, bits: int, **more: Any) -> Coded:
        more.setdefault("grid", "odd")
        mask: GroupMask | None = more.get("mask")
        count = mask.num_survivors(across) if mask else across
        return Coded(down, across, bits, codes=codes((down, count), bits), **{"row": scales(down, 1), **more})

    def codebook(down: int, across: int, bits: int, length: int, tile: int, **more: Any) -> Codebook:
        stages = len(more["gains"]) if "gains" in more else 1
        blocks = -(-down // tile) * -(-across // length)
        rest = {"row": scales(), "book": Book("seeded"), **more}
        return Codebook(down, across, bits, length, codes=codes((stages * blocks,), bits), tile=tile, **rest)

    def patches(size: int, bits: int) -> Patches:
        total = -(-rows // size) * -(-cols // size)
        flags = torch.arange(total) % 3 > 0
        count = int(flags.sum())
        present = layout.pack(flags, 1)
        return Patches(rows, cols, size, bits, codes((count, size**2), bits), scales(count), present)

    def placed(term: Coded | Codebook, block: int) -> Placed:
        """On every other block; the term has that many columns."""
        return Placed(term, cols, block, layout.pack(torch.arange(-(-cols // block)) % 2 == 0, 1))

    def half(block: int) -> int:
        return sum(min(block, cols - start) for start in range(0, cols, 2 * block))

    explicit = GroupMask(4, keep=2)
    first = torch.randint(3, (rows, explicit.num_groups(cols)), generator=generator)
    places = torch.stack((torch.zeros_like(first), first + 1), -1).flatten(1)  # int64 [rows, 2 · groups], ascending
    if cols % 4:  # the last group has as many columns as it has
        places[:, -2:] = torch.tensor([0, min(1, cols % 4 - 1)])
    places = places[:, : explicit.num_survivors(cols)]
    value = (SCALE * torch.randn(rows, cols, generator=generator)).bfloat16().float()
    several = SeededMask(5, seed, site, keep=2, stream=1, tile=2)
    survivors = several.num_survivors(cols)
    return {
        "codebook": codebook(rows, cols, 5, 4, 2),
        "codebook-rows": codebook(rows, cols, 3, 5, 1, signed=False, row=scales(rows, 1), book=Book("seeded", 3)),
        "codebook-stages": codebook(
            rows,
            cols,
            4,
            5,
            1,
            gains=torch.tensor([1.0, 0.25]),
            levels=codes((rows,), 4),
            boosted=torch.tensor([5, 0, 7], dtype=torch.int16),
            boosts=(2, 0, 1),
        ),
        "codebook-turns": codebook(rows, cols, 4, 5, 1, gains=torch.tensor([1.0, 0.5, 0.25]), turns=2),
        "patches": patches(4, 3),
        "placed": placed(coded(rows, half(2), 4, grid="int"), 2),
        "placed-codebook": placed(codebook(rows, half(4), 6, 3, 1), 4),
        "rotated": Rotated(coded(rows, cols, 2), Rotation("hadamard", 8), None),
        "rotated-patches": Rotated(patches(4, 2), Rotation("dct", 4), Rotation("dct", 4)),
        "rotated-codebook": Rotated(
            codebook(rows, cols, 4, 2, 1, signed=False, row=scales(rows, 1), book=Book("gaussian")),
            Rotation("hadamard", 4),
            Rotation("hadamard", 2),
        ),
        "exact": Exact.of(value),
        "explicit": coded(rows, cols, 5, mask=ExplicitMask(4, layout.pack(places, 2), keep=2)),
        "groups": coded(rows, cols, 3, row=scales(rows, -(-cols // 4)), group=4),
        "table": coded(rows, cols, 2, grid="table", table=torch.randn(4, generator=generator)),
        "several": Coded(
            rows,
            cols,
            16,
            "float",
            (SCALE * torch.randn(rows, survivors, generator=generator)).bfloat16(),
            mask=several,
        ),
        "factors": LowRank(coded(rows, 3, 2), torch.ones(3), coded(3, cols, 6, row=scales(), col=scales(cols))),
    }
