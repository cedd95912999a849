"""The tables of vectors that codes point into: part of the format, the same on every machine, never in an artifact.

seeded     entry (c, j) from the four bytes of one Philox word: ((b₀ + b₁ + b₂ + b₃) >> 1) − 255, close to Gaussian and
           exact in bfloat16; every vector then scaled to the norm √length. Counter: row c, word j, stream; key and
           site are the format's. But for that norm a shorter table is the beginning of a longer one, so that all
           layers and tenants share one.
gaussian   2^index_bits vectors of `length` with a mean square error close to the least on a Gaussian source, found once
           (books/make.py) and shipped for some pairs: books/gaussian.npz, arrays "LENGTH-BITS", float32
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deltaserve_kernels.philox import random_words

SEED, SITE = 0x64656C74_61736572, 1  # the format's own: changing them is a new kind of book
GRIDS = Path(__file__).parent.parent / "books" / "gaussian.npz"


@dataclass(frozen=True)
class Book:
    """`stream` tells the tables of several seeded stages apart."""

    kind: Literal["seeded", "gaussian"] = "seeded"
    stream: int = 0

    def exists(self, index_bits: int, length: int) -> bool:
        return self.kind == "seeded" or f"{length}-{index_bits}" in _gaussian_names()

    def table(self, index_bits: int, length: int, device: str = "cpu") -> Tensor:
        """float32 [2^index_bits, length], for entries of variance one; shared, not to be changed."""
        if self.kind == "seeded":
            return _seeded(self.stream, index_bits, length, device)
        return _gaussian(index_bits, length, device)


@cache
def _seeded(stream: int, index_bits: int, length: int, device: str) -> Tensor:
    words = random_words(SEED, SITE, 2**index_bits, length, stream=stream, device=device)
    total = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)]).sum(0)
    table = ((total >> 1) - 255).double()
    norms = table.square().sum(1, keepdim=True).sqrt().clamp(min=1)
    scaled: Tensor = table / norms * length**0.5
    return scaled.float()


@cache
def _gaussian_names() -> frozenset[str]:
    with np.load(GRIDS) as grids:
        return frozenset(grids.files)


@cache
def _gaussian(index_bits: int, length: int, device: str) -> Tensor:
    with np.load(GRIDS) as grids:
        return torch.from_numpy(grids[f"{length}-{index_bits}"]).to(device)
