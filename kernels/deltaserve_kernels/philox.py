"""Philox 4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

Ten rounds over a 128-bit counter with a 64-bit key; no state, so that any word can be computed anywhere, in any order.
Part of the artifact format: the same words on CPU and GPU, in every version. Checked against its authors' test vectors.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Four int64 tensors of 32-bit counter words, broadcastable → four int64 tensors of 32-bit random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply(c0, _M0)
        hi1, lo1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit words of the product: below 2^64, so int64 keeps all its bits, the sign bit among them."""
    product = a * m
    return product >> 32 & _MASK, product & _MASK


def random_words(
    seed: int, site: int, rows: int, words_per_row: int, *, stream: int = 0, device: str = "cpu"
) -> Tensor:
    """int64 [rows, words_per_row] of 32-bit words.

    Word j of row r is output j mod 4 of Philox with counter (j div 4, r, site, stream), key (seed low, seed high).
    `site` is a 32-bit number of the tensor (terms.site_number of its name), `seed` a 64-bit number of the artifact.
    """
    column = torch.arange(-(-words_per_row // 4), device=device)[None, :]
    row = torch.arange(rows, device=device)[:, None]
    fixed = torch.tensor([site, stream], device=device)
    key = (seed & _MASK, seed >> 32 & _MASK)
    words = philox_4x32_10((column, row, fixed[0], fixed[1]), key)
    # int64 [rows, words / 4, 4]
    return torch.stack([word.expand(rows, column.shape[1]) for word in words], dim=-1).flatten(1)[:, :words_per_row]
