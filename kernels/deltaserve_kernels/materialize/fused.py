"""W + Δ of a layer, out of place: a program for each tile, which goes through the delta's parts in their order.

    out[n, c] = round(s[n] · W[n, c] + Σ_parts (q[n, c] − z) · scale[n, c / group] · col[c]
                      + Σ_entries value · col[c] where the entry's column is c + Σ_r left[n, r] · right[r, c])

Sums are float32 and rounded once. The same kernel first writes the factors of low-rank terms, float32, PHASE 2 (right)
and 3 (left), without W. A layer has fewer than 2^31 weights. Codes are read one by one from the strided slots
(fused/slots.py). An entry is compared with every column of its tile: nothing is scattered, and no two programs write
the same place. README.md has the layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.fused.device import load_float, parts_of, row_scales
from deltaserve_kernels.sparse_matmul.fused import load_entries


@triton.jit
def _column_factors(words, start, stop, variant):
    """Offset of the factors that form `variant` multiplies columns by; 0: there are none."""
    found = tl.load(words + start * 16) * 0
    for number in range(start, stop):
        part = words + number * 16
        same = (tl.load(part) % 32 == 1) & (tl.load(part + 6) == variant)
        found = tl.where(same, tl.load(part + 10), found)
    return found


@triton.jit
def _codes(pool_word, pool_float, bundle, part, n, c, LANES: tl.constexpr):
    """float32 [N, C]: (q − z) · the scale of its group; float16 values as they are; 0 past the last superblock, and
    anything past the last row."""
    bits = tl.load(part + 1).to(tl.int32)
    superblocks = tl.load(part + 5).to(tl.int32)
    n = tl.minimum(tl.maximum(n, 0), (tl.load(part + 12).to(tl.int32) + 63) // 64 * 64 - 1)
    width = superblocks * LANES * (16 // bits)
    inside = (c >= 0) & (c < width)
    c = tl.minimum(tl.maximum(c, 0), width - 1)
    block = c // LANES
    number, slot = block // (16 // bits), block % (16 // bits)
    row = (n // 64) * superblocks * 64 + n % 64
    at = row[:, None] * (LANES // 2) + (number * (64 * LANES // 2) + c % LANES // 2)[None, :]
    word = tl.load(pool_word + (bundle + tl.load(part + 2)) * 4 + at)
    code = (word >> (slot * bits + 16 * (c % 2))[None, :]) & ((1 << bits) - 1)
    if bits == 16:
        values = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        values = code.to(tl.float32) - load_float(part, 7)
    group = tl.load(part + 11).to(tl.int32)
    if group != 0:
        groups = tl.load(part + 15).to(tl.int32)
        scale = ((n // 64) * groups * 64 + n % 64)[:, None] + (c // group * 64)[None, :]
        values *= tl.load(pool_float + (bundle + tl.load(part + 8)) * 4 + scale)
    return tl.where(inside[None, :], values, 0.0)


@triton.jit
def _first_past(starts, count, column):
    """The first entry whose origin is past a column; origins ascend."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        past = tl.load(starts + 2 * middle) > column
        high = tl.where(past, middle, high)
        low = tl.where(past, low, middle + 1)
    return low


@triton.jit
def _entries(pool_byte, pool_word, pool_float, bundle, part, n, c, first, last, rows,
             N: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """float32 [N, C] of the entries of a mask with columns in first … last."""
    bits = tl.load(part + 1).to(tl.int32)
    count = tl.load(part + 5).to(tl.int32)
    index_bits = tl.load(part + 11).to(tl.int32)
    packed = pool_byte + (bundle + tl.load(part + 2)) * 16 + (n // 64).to(tl.int64) * count * 8 * bits
    starts = pool_word + (bundle + tl.load(part + 9)) * 4
    values = pool_float + (bundle + tl.load(part + 10)) * 4
    total = tl.zeros((N, C), tl.float32)
    begin = _first_past(starts, count, first - (1 << index_bits))
    for j in range(begin, _first_past(starts, count, last)):
        entry = load_entries(packed + j * 8 * bits, n % 64, rows, bits, 8)
        column = tl.load(starts + 2 * j) + (entry & ((1 << index_bits) - 1))
        code = entry >> index_bits
        if bits - index_bits == 16:
            weight = (code << 16).to(tl.float32, bitcast=True)
        else:
            weight = tl.load(values + tl.load(starts + 2 * j + 1) + code, mask=rows, other=0.0)
        total += tl.where(rows[:, None] & (column[:, None] == c[None, :]), weight[:, None], 0.0)
    return total


@triton.jit(do_not_specialize=["slot", "site", "rows", "cols", "rank"])
def materialize_kernel(
    pool_byte, pool_word, pool_float, pool_field, slots, weight, left, right, out, slot, site, rows, cols, rank,
    PHASE: tl.constexpr, LANES: tl.constexpr, N: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """PHASE 1: weight, out [rows, cols], left float32 [rows, rank], right float32 [rank, cols], rank a multiple of R.
    PHASE 2 and 3: out is right or left, the others are not read."""
    across = (cols + C - 1) // C
    first_row, first = tl.program_id(0) // across * N, tl.program_id(0) % across * C
    n, c = first_row + tl.arange(0, N), first + tl.arange(0, C)
    at = n[:, None] * cols + c[None, :]
    there = (n < rows)[:, None] & (c < cols)[None, :]
    bundle, words, start, stop = parts_of(pool_field, slots, slot, site)
    if PHASE == 1:
        total = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    else:
        total = tl.zeros((N, C), tl.float32)
    for number in range(start, stop):
        part = words + number * 16
        tag = tl.load(part) % 32
        own_n = n - tl.load(part + 14).to(tl.int32)
        own_c = c - tl.load(part + 13).to(tl.int32) * 128
        real = (own_n >= 0) & (own_n < tl.load(part + 12))
        if tag == 0:
            if PHASE == 1:
                total *= row_scales(pool_float, bundle, part, n, n < rows)[:, None]
        elif (tag == PHASE * 8 + 2) | (tag == PHASE * 8 + 3):
            if tag == PHASE * 8 + 2:
                values = _codes(pool_word, pool_float, bundle, part, own_n, own_c, LANES)
            else:
                low = first - tl.load(part + 13).to(tl.int32) * 128
                values = _entries(
                    pool_byte, pool_word, pool_float, bundle, part, own_n, own_c, low, low + C - 1, real, N, C
                )
            factors = _column_factors(words, start, stop, tl.load(part + 6))
            col = tl.load(pool_float + (bundle + factors) * 4 + c, mask=(c < cols) & (factors != 0), other=1.0)
            scales = tl.where(real, row_scales(pool_float, bundle, part, own_n, real), 0.0)
            total += values * scales[:, None] * col[None, :]
    if PHASE == 1:
        for r in range(0, rank, R):
            k = r + tl.arange(0, R)
            a = tl.load(left + n[:, None] * rank + k[None, :], mask=(n < rows)[:, None], other=0.0)
            b = tl.load(right + k[:, None] * cols + c[None, :], mask=(c < cols)[None, :], other=0.0)
            total = tl.dot(a, b, total)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)
