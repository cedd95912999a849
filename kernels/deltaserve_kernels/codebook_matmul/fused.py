"""Vectors of a table times activations, many deltas in a launch: grids.

    y[m, n] += s[n] · Σ_s Σ_j table[code[n, s]][j] · x̂[m, s · length + j] · 2^e[m]

A vector is one load, and weights meet the activations in tl.dot: cheaper than products with every vector of the table
(sparse_matmul on P) as long as vectors are short. Seeded books have long ones: they are projected by `project`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.fused.device import add_to, load_segment, parts_of, row_scales, tile_of
from deltaserve_kernels.sparse_matmul.fused import load_entries


@triton.jit(do_not_specialize=["site", "key", "rows", "tiles", "width", "y_stride"])
def grid_matmul_kernel(
    pool_byte, pool_value, pool_float, pool_field, slots, segments, x, exponents, y,
    site, key, rows, tiles, width, y_stride,
    EACH: tl.constexpr, LENGTH: tl.constexpr, PADDED: tl.constexpr, SEGMENTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The table's vectors are float16 [PADDED], of which LENGTH count; SEGMENTS of them at a time."""
    COLS: tl.constexpr = SEGMENTS * PADDED
    for item in range(tl.program_id(0), tl.load(segments) * tiles, PROGRAMS):
        slot, first, count = load_segment(segments, item // tiles)
        n = (item % tiles) * N + tl.arange(0, N)
        m = first + tl.arange(0, M)
        real = tl.arange(0, M) < count
        bundle, words, start, stop = parts_of(pool_field, slots, slot, site)
        total = tl.zeros((N, M), tl.float32)
        height = 0
        for number in range(start, stop):
            part = words + number * 16
            if tl.load(part) == key:
                height = tl.load(part + 12).to(tl.int32)
                known = n < height
                bits = tl.load(part + 1).to(tl.int32)
                length = tl.load(part + 5).to(tl.int32)
                variant = tl.load(part + 6) * rows
                codes_at = (bundle + tl.load(part + 2)) * 16 + (n // 64).to(tl.int64) * length * 8 * bits
                packed = pool_byte + codes_at[:, None]
                table = pool_value + (bundle + tl.load(part + 10)) * 8
                k = tl.arange(0, COLS)
                inner = tl.zeros((N, M), tl.float32)
                for begin in range(0, length, SEGMENTS):
                    segment = begin + tl.arange(0, SEGMENTS)
                    inside = (n % 64)[:, None] + segment[None, :] * 0
                    there = known[:, None] & (segment < length)[None, :]
                    codes = load_entries(packed + segment[None, :] * 8 * bits, inside, there, bits, 8)
                    vectors = table + codes[:, :, None] * PADDED + tl.arange(0, PADDED)[None, None, :]
                    weights = tl.load(vectors, mask=there[:, :, None], other=0.0).reshape(N, COLS)
                    column = (begin + k // PADDED) * LENGTH + k % PADDED
                    kept = (k % PADDED < LENGTH) & (begin + k // PADDED < length)
                    at = x + (variant + m)[None, :] * width + column[:, None] + tl.load(part + 13) * 128
                    a = tl.load(at, mask=kept[:, None], other=0.0)
                    inner = tl.dot(weights, a, inner)
                exponent = tl.load(exponents + variant + m, mask=real, other=0.0)
                inner = inner * row_scales(pool_float, bundle, part, n, known)[:, None] * exponent[None, :]
                if EACH:
                    to = tile_of(y + tl.load(part + 14), m, n, y_stride)
                    add_to(to, inner, real[None, :] & known[:, None])
                else:
                    total += inner
        if not EACH:
            if height != 0:
                add_to(tile_of(y, m, n, y_stride), total, real[None, :] & (n < height)[:, None])
