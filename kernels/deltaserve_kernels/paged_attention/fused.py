"""Attention of one query a sequence: a program for each sequence, kv head and part of the context, then their sum.

Which blocks a sequence has and how long it is, is read from the device: a launch depends on neither. Parts have one
size, whatever the batch: a row's result depends on its own sequence alone, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

TILE = 4096  # numbers of K or V: 32 positions of a head of 128; with more, registers are spilled
GROUP_ROWS = 16  # heads of a group are padded to it, the least that tensor cores take
LARGEST_HEAD = 256
MOST_PARTS = 64  # of a context
WARPS = 4


@triton.jit
def _visible(lengths, b, window):
    """→ first and last + 1 position that a query sees; `window` 0: all."""
    length = tl.load(lengths + b)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    return first, length


@triton.jit(
    do_not_specialize=["width", "window", "parts"],
    do_not_specialize_on_alignment=["tables", "lengths", "peaks", "sums"],
)
def paged_attention_kernel(
    q, keys, values, tables, lengths, partial, peaks, sums, width, window, parts, scaling, softcap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_V: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    CAPPED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One part of a context: Σ exp(s − peak) · v, the peak and Σ exp(s − peak); nothing where no position is seen.
    WIDEN: products in float32, for Triton's interpreter, which has none of bfloat16."""
    b, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, length = _visible(lengths, b, window)
    start = tl.maximum(part * PART, first)
    stop = tl.minimum((part + 1) * PART, length)
    if start < stop:
        group: tl.constexpr = HEADS // KV_HEADS
        g, d, dv = tl.arange(0, G), tl.arange(0, D), tl.arange(0, DV)
        head = kv_head * group + g
        known = g < group
        query = tl.load(
            q + (b * HEADS + head)[:, None] * SIZE + d[None, :], mask=known[:, None] & (d < SIZE)[None, :], other=0.0
        )
        if WIDEN:
            query = query.to(tl.float32)
        peak = tl.full([G], float("-inf"), tl.float32)
        total = tl.zeros([G], tl.float32)
        sum_v = tl.zeros([G, DV], tl.float32)
        for at in range(part * PART + (start - part * PART) // N * N, stop, N):
            position = at + tl.arange(0, N)
            seen = (position >= start) & (position < stop)
            block = tl.load(tables + b.to(tl.int64) * width + position // BLOCK, mask=seen, other=0)
            slot = block.to(tl.int64) * BLOCK + position % BLOCK
            k = tl.load(
                keys + (slot * KV_HEADS + kv_head)[:, None] * SIZE + d[None, :],
                mask=seen[:, None] & (d < SIZE)[None, :], other=0.0,
            )  # fmt: skip
            scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee") * scaling
            if CAPPED:
                e = tl.exp(-2.0 * tl.abs(scores) / softcap)  # tanh, of a number that does not overflow
                scores = softcap * tl.where(scores < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            shares = tl.exp(scores - higher[:, None])
            kept = tl.exp(peak - higher)
            v = tl.load(
                values + (slot * KV_HEADS + kv_head)[:, None] * SIZE_V + dv[None, :],
                mask=seen[:, None] & (dv < SIZE_V)[None, :], other=0.0,
            )  # fmt: skip
            v = v.to(query.dtype)
            sum_v = sum_v * kept[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
            total = total * kept + tl.sum(shares, 1)
            peak = higher
        to = (b * HEADS + head).to(tl.int64) * parts + part
        tl.store(peaks + to, peak, mask=known)
        tl.store(sums + to, total, mask=known)
        tl.store(partial + to[:, None] * SIZE_V + dv[None, :], sum_v, mask=known[:, None] & (dv < SIZE_V)[None, :])


@triton.jit(do_not_specialize=["window", "parts"], do_not_specialize_on_alignment=["lengths", "peaks", "sums", "sinks"])
def paged_sum_kernel(
    partial, peaks, sums, lengths, sinks, y, window, parts,
    HEADS: tl.constexpr, SIZE_V: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """y[b, h] = Σ_p exp(peak_p − peak) · partial_p / (Σ_p exp(peak_p − peak) · sum_p + exp(sink − peak))"""
    b, h = tl.program_id(0), tl.program_id(1)
    first, length = _visible(lengths, b, window)
    dv = tl.arange(0, DV)
    known = dv < SIZE_V
    row = (b * HEADS + h).to(tl.int64)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    sum_v = tl.zeros([DV], tl.float32)
    if SINKS:
        peak = tl.load(sinks + h).to(tl.float32)
        total = total + 1.0
    for part in range(first // PART, (length + PART - 1) // PART):
        at = row * parts + part
        own = tl.load(peaks + at)
        higher = tl.maximum(peak, own)
        kept, added = tl.exp(peak - higher), tl.exp(own - higher)
        sum_v = sum_v * kept + tl.load(partial + at * SIZE_V + dv, mask=known, other=0.0) * added
        total = total * kept + tl.load(sums + at) * added
        peak = higher
    answer = tl.where(length > 0, sum_v / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(y + row * SIZE_V + dv, answer.to(y.dtype.element_ty), mask=known)


def tile_positions(d: int, dv: int) -> int:
    return min(64, max(16, TILE // max(d, dv)))


class PagedAttention:
    """Of a model whose sequences have at most `positions` tokens, in blocks of `block_size`."""

    def __init__(self, positions: int, block_size: int) -> None:
        self.block_size = block_size
        self.part = max(256, 64 * -(-positions // (MOST_PARTS * 64)))

    @staticmethod
    def fits(keys: Tensor, values: Tensor) -> bool:
        return max(keys.shape[2], values.shape[2]) <= LARGEST_HEAD and keys.dtype == values.dtype

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lengths: Tensor,
        scaling: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`naive.paged_attention`. Of `tables` rows may lie apart; lengths up to blocks · block_size."""
        assert keys.is_contiguous()
        assert values.is_contiguous()
        rows, heads, size = q.shape
        kv_heads, size_v = values.shape[1:]
        parts = -(-tables.shape[1] * self.block_size // self.part)
        partial = torch.empty(rows, heads, parts, size_v, device=q.device)
        peaks, sums = torch.empty(2, rows, heads, parts, device=q.device)
        y = torch.empty(rows, heads, size_v, dtype=q.dtype, device=q.device)
        width, (d, dv) = tables.stride(0), (max(16, triton.next_power_of_2(n)) for n in (size, size_v))
        paged_attention_kernel[(rows, kv_heads, parts)](
            q.contiguous(), keys, values, tables, lengths, partial, peaks, sums,
            width, window or 0, parts, scaling, softcap or 0.0,
            heads, kv_heads, size, size_v, d, dv, max(GROUP_ROWS, triton.next_power_of_2(heads // kv_heads)),
            tile_positions(d, dv), self.block_size, self.part,
            softcap is not None, bool(knobs.runtime.interpret), num_warps=WARPS,
        )  # fmt: skip
        paged_sum_kernel[(rows, heads)](
            partial, peaks, sums, lengths, sums if sinks is None else sinks, y, window or 0, parts,
            heads, size_v, dv, self.part, sinks is not None, num_warps=1,
        )  # fmt: skip
        return y
