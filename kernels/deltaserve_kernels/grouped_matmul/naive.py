"""Definition of the grouped matmul, reference of its tests, and the path that runs where no fused kernel does.

    coded      y = ((x · diag(col)) · grid(codes)ᵀ) · diag(row)
    low rank   y = ((x · Rᵀ) ⊙ s) · Lᵀ                            shrink, then expand: two matmuls
    patches    y[block row of k] += x[block column of k] · patchₖᵀ

The codes go into the product as exact small integers; scales multiply activations, never weights — but for scales of
groups of columns, which multiply their weights here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels.terms.coded import Coded
from deltaserve_kernels.terms.patches import Patches


def coded_matmul(x: Tensor, term: Coded) -> Tensor:
    """x [T, cols] → [T, rows], both of x's dtype. `term` has no mask."""
    if term.col is not None:
        x = x * term.col.to(x.dtype)
    weights, scales = term.values(x.dtype), term.row_scales(x.dtype)
    if scales is None:
        return F.linear(x, weights)
    return F.linear(x, weights * scales) if term.group else F.linear(x, weights) * scales.flatten()


def patch_matmul(x: Tensor, term: Patches) -> Tensor:
    """x [T, cols] → [T, rows], both of x's dtype. `term` is in serving form."""
    assert term.index is not None, "patches are served with their places"
    down, across = term.grid_shape
    blocks = F.pad(x, (0, across * term.size - term.cols)).view(-1, across, term.size).transpose(0, 1)
    products = blocks[term.index % across] @ term.values(x.dtype).mT  # [n, T, size]
    y = torch.zeros(down, *products.shape[1:], dtype=x.dtype, device=x.device)
    y.index_add_(0, term.index // across, products)
    return y.transpose(0, 1).flatten(1)[:, : term.rows]
