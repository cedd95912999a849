"""Weighted gather-sums, many deltas in a launch: masks and books.

    y[m, n] += s[n] · Σ_j value(entry[n, j]) · source[m, starts[j] + index(entry[n, j]) · tile + n mod tile] · 2^e[m]

An entry is index + (value code << index bits); a value is a number of the part's table, or with 16 value bits a
bfloat16 itself. The source of masks is x̂; that of books the projections P (codebook_matmul). A row of activations at a
time, in the order of the entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.fused.device import add_to, load_segment, parts_of, row_scales


@triton.jit
def _plane(packed, row, known, WIDTH: tl.constexpr):
    """int32 like row: `WIDTH` bits of each of a tile's 64 rows."""
    byte = tl.load(packed + row * WIDTH // 8, mask=known, other=0).to(tl.int32)
    return (byte >> (row * WIDTH % 8)) & ((1 << WIDTH) - 1)


@triton.jit
def load_entries(packed, row, known, bits, EIGHTH: tl.constexpr):
    """int32 like row: codes `row` of a run of 8 · EIGHTH in planes (fused/slots.py); packed: the run's first byte."""
    entry = row * 0
    low = 0
    for _ in range(bits // 8):
        entry |= _plane(packed + EIGHTH * low, row, known, 8) << low
        low += 8
    if bits & 4:
        entry |= _plane(packed + EIGHTH * low, row, known, 4) << low
        low += 4
    if bits & 2:
        entry |= _plane(packed + EIGHTH * low, row, known, 2) << low
        low += 2
    if bits & 1:
        entry |= _plane(packed + EIGHTH * low, row, known, 1) << low
    return entry


@triton.jit(
    do_not_specialize=["site", "key", "rows", "tiles", "width", "y_stride"],
    do_not_specialize_on_alignment=["exponents"],
)
def gather_matmul_kernel(
    pool_byte, pool_word, pool_float, pool_field, slots, segments, source, exponents, y,
    site, key, rows, tiles, width, y_stride,
    EACH: tl.constexpr, N: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """source float16 [variants, rows, width], exponents float32 [variants, rows]; segments of one row."""
    for item in range(tl.program_id(0), tl.load(segments) * tiles, PROGRAMS):
        slot, m, _count = load_segment(segments, item // tiles)
        n = (item % tiles) * N + tl.arange(0, N)
        bundle, words, start, stop = parts_of(pool_field, slots, slot, site)
        total = tl.zeros((N,), tl.float32)
        height = 0
        for number in range(start, stop):
            part = words + number * 16
            if tl.load(part) == key:
                height = tl.load(part + 12).to(tl.int32)
                known = n < height
                tile = tl.load(part + 15).to(tl.int32)
                bits = tl.load(part + 1).to(tl.int32)
                index_bits = tl.load(part + 11).to(tl.int32)
                count = tl.load(part + 5).to(tl.int32)
                place = tl.load(part + 6) * rows + m
                owner = n // tile  # the row of entries
                inside = owner % 64
                packed = pool_byte + (bundle + tl.load(part + 2)) * 16 + (owner // 64).to(tl.int64) * count * 8 * bits
                starts = pool_word + (bundle + tl.load(part + 9)) * 4
                values = pool_float + (bundle + tl.load(part + 10)) * 4
                origin = source + place.to(tl.int64) * width + tl.load(part + 13) * 128 + n % tile
                inner = tl.zeros((N,), tl.float32)
                if bits - index_bits == 16:
                    for j in range(count):
                        entry = load_entries(packed + j * 8 * bits, inside, known, bits, 8)
                        index = tl.load(starts + 2 * j) + (entry & ((1 << index_bits) - 1)) * tile
                        weight = ((entry >> index_bits) << 16).to(tl.float32, bitcast=True)
                        inner += weight * tl.load(origin + index, mask=known, other=0.0).to(tl.float32)
                else:
                    for j in range(count):
                        entry = load_entries(packed + j * 8 * bits, inside, known, bits, 8)
                        index = tl.load(starts + 2 * j) + (entry & ((1 << index_bits) - 1)) * tile
                        weight = tl.load(
                            values + tl.load(starts + 2 * j + 1) + (entry >> index_bits), mask=known, other=0.0
                        )
                        inner += weight * tl.load(origin + index, mask=known, other=0.0).to(tl.float32)
                inner = inner * row_scales(pool_float, bundle, part, n, known) * tl.load(exponents + place)
                if EACH:
                    add_to(y + m.to(tl.int64) * y_stride + tl.load(part + 14) + n, inner, known)
                else:
                    total += inner
        if not EACH:
            if height != 0:
                add_to(y + m.to(tl.int64) * y_stride + n, total, n < height)
