"""Projections of activations on a seeded book.

    P[t, s, c, r] = Σ_j x̂[t, s · length + j] · C[c][r · length + j] · 2^−shift

By fast transforms (terms/books.py): nobody holds the table. Shared by all deltas that use the book.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels.fused.parts import BookForm
from deltaserve_kernels.hadamard import walsh_hadamard
from deltaserve_kernels.terms.books import seeded_signs

CHUNK_PRODUCTS = 2**25  # made at once, in float32 between the transforms


def project(x: Tensor, form: BookForm) -> Tensor:
    """x̂ float16 [T, width] → P float16 [T, form.width], in the order segment, index, row of a tile."""
    pieces = torch.split(x, max(1, CHUNK_PRODUCTS // form.width))
    return torch.cat([_products(piece, form) for piece in pieces])


def _products(x: Tensor, form: BookForm) -> Tensor:
    rows, size, width = len(x), form.size, form.segments * form.length
    signs = seeded_signs(
        form.book.stream, form.index_bits, form.tile * form.length, str(x.device)
    )  # [transforms, size]
    segments = F.pad(x[:, :width], (0, max(0, width - x.shape[1]))).float().view(rows, form.segments, 1, form.length)
    blocks = segments.new_zeros(rows, form.segments, form.tile, size)
    for r in range(form.tile):
        blocks[:, :, r, r * form.length : (r + 1) * form.length] = segments[:, :, 0]
    once = walsh_hadamard(blocks)[:, :, :, None] * signs  # [T, segments, tile, 1, size] · [transforms, size]
    scale = size**-0.5 * 2.0**-form.shift
    products = (walsh_hadamard(once) * scale).flatten(3)[..., : 1 << form.index_bits]
    projected: Tensor = products.transpose(2, 3).flatten(1).half()
    return projected
