"""Definition of attention over a paged cache by one query a sequence, and reference of the fused kernel.

    y[b, h] = Σ_i softmax(s[b, h] ‖ sinks[h])_i · V[slot(b, i), h // group]
    s[b, h, i] = cap(scaling · q[b, h] · K[slot(b, i), h // group])        cap(s) = c · tanh(s / c), where there is a c
    slot(b, i) = tables[b, i // block_size] · block_size + i mod block_size

over the positions max(0, lengths[b] − window) ≤ i < lengths[b]; 0 where there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    block_size: int,
    scaling: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, heads, size], keys [slots, kv heads, size], values [slots, kv heads, size of v], tables int32 [B, blocks],
    lengths int32 [B], sinks [heads] → [B, heads, size of v] of q's dtype, computed in float32."""
    y = q.new_zeros(*q.shape[:2], values.shape[2])
    group = q.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths.tolist()):
        position = torch.arange(0 if window is None else max(0, length - window), length, device=q.device)
        slots = tables[row, position // block_size].long() * block_size + position % block_size
        if not len(slots):
            continue
        k, v = (x[slots].float().repeat_interleave(group, 1) for x in (keys, values))  # [positions, heads, …]
        scores = torch.einsum("hd,ihd->hi", q[row].float(), k) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None]], 1)
        shares = torch.softmax(scores, 1)[:, : len(slots)]
        y[row] = torch.einsum("hi,ihd->hd", shares, v).to(y.dtype)
    return y
