"""Definition of the codebook matmul: one projection of the activations on the table, then a signed gather-sum. Ours.

    P[t, s, r, c] = Σ_j x[t, s·length + j] · C[c][r·length + j]         no tenant in it: the same for all that share C
    y[t, i·tile + r] = scale of the row · Σ_k gain_k · Σ_s ± P[t, s, r, place_k(i, s)]

No weight is ever multiplied: a tenant costs one addition for each code and token. Boosts are applied to x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels.terms.codebook import Codebook


def codebook_matmul(x: Tensor, term: Codebook) -> Tensor:
    """x [T, cols] → [T, rows], both of x's dtype."""
    if (columns := term.column_scales()) is not None:
        x = x * columns.to(x.dtype)
    segments = F.pad(x, (0, term.segments * term.length - term.cols)).view(-1, term.segments, term.length)
    projected = torch.einsum("tsj,crj->scrt", segments, term.table().to(x.dtype))  # [segments, 2^b, tile, T]
    index, factor = term.indices()  # [stages, tiles, segments]
    place = torch.arange(term.segments, device=x.device) << term.table_bits
    bags = (place + index).transpose(0, 1).flatten(1)  # [tiles, stages · segments]
    weights = None if factor is None else factor.transpose(0, 1).flatten(1).to(x.dtype)
    y = F.embedding_bag(bags, projected.flatten(2).flatten(0, 1), per_sample_weights=weights, mode="sum")
    whole = y.view(term.tiles * term.tile, len(x))[: term.rows].T  # [tiles, tile · T] → [T, rows]
    return whole * term.row_scales().to(x.dtype).flatten()
