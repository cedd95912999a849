"""The tables of vectors that codes point into: part of the format, the same on every machine, never in an artifact.

seeded     rows of randomised Hadamard transforms, n = 2^⌈log₂ length⌉ at a time, 2 at least; H is Sylvester's, of ±1:

               C[k·n + a][j] = n^(−1/2) · Σ_m H[a, m] · d_k[m] · H[m, j]        a < n, j < length

           d_k[m] = ±1, − where bit 0 of word m of row k is set (philox; key and site are the format's). Entries are
           close to Gaussian: a column that dominates finds many sizes among them, which ±1 would not give it. Products
           of an x with the table are 1 + 2^index_bits / n fast transforms, so nobody has to hold the table
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

from deltaserve_kernels.hadamard import walsh_hadamard, walsh_matrix
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


def seeded_size(length: int) -> int:
    """n: rows of one transform."""
    return max(2, 1 << (length - 1).bit_length())


@cache
def seeded_signs(stream: int, index_bits: int, length: int, device: str) -> Tensor:
    """d, float32 ±1 [transforms, n]"""
    n = seeded_size(length)
    words = random_words(SEED, SITE, -(-(1 << index_bits) // n), n, stream=stream, device=device)
    return 1.0 - 2.0 * (words & 1)


@cache
def _seeded(stream: int, index_bits: int, length: int, device: str) -> Tensor:
    n, signs = seeded_size(length), seeded_signs(stream, index_bits, length, device)
    place = torch.arange(min(1 << index_bits, n), device=device)
    rows = walsh_matrix(place, n) * signs[:, None]  # [transforms, rows of each, n]
    table: Tensor = (walsh_hadamard(rows)[..., :length].double() / n**0.5).float().flatten(0, 1)
    return table


@cache
def _gaussian_names() -> frozenset[str]:
    with np.load(GRIDS) as grids:
        return frozenset(grids.files)


@cache
def _gaussian(index_bits: int, length: int, device: str) -> Tensor:
    with np.load(GRIDS) as grids:
        return torch.from_numpy(grids[f"{length}-{index_bits}"]).to(device)
