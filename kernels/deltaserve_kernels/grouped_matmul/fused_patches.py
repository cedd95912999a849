"""Square patches of codes times activations, many deltas in a launch.

    y[m, i·p + r] += Σ_{patches k in row i} scale[k] · Σ_c (2 q[k, r, c] − 2^b + 1) · x̂[m, column(k)·p + c] · 2^e[m]

Codes stay in their disk form. Programs go through (segments × rows of patches).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.fused.device import add_to, load_float, load_segment, parts_of, tile_of
from deltaserve_kernels.sparse_matmul.fused import load_entries


@triton.jit(do_not_specialize=["site", "key", "rows", "tiles", "width", "y_stride"])
def patch_matmul_kernel(
    pool_byte, pool_word, pool_float, pool_field, slots, segments, x, exponents, y,
    site, key, rows, tiles, width, y_stride,
    SIZE: tl.constexpr, M: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """`tiles`: rows of patches. A part's STARTS int32 [tiles + 1], its GROUP_SCALE float32 [patches], its VALUES int32
    [patches]: the column of each."""
    for item in range(tl.program_id(0), tl.load(segments) * tiles, PROGRAMS):
        slot, first, count = load_segment(segments, item // tiles)
        block = item % tiles
        n = block * SIZE + tl.arange(0, SIZE)
        m = first + tl.arange(0, M)
        real = tl.arange(0, M) < count
        bundle, words, start, stop = parts_of(pool_field, slots, slot, site)
        total = tl.zeros((SIZE, M), tl.float32)
        height = 0
        for number in range(start, stop):
            part = words + number * 16
            if tl.load(part) == key:
                height = tl.load(part + 12).to(tl.int32)
                bits = tl.load(part + 1).to(tl.int32)
                variant = tl.load(part + 6) * rows
                packed = pool_byte + (bundle + tl.load(part + 2)) * 16
                starts = pool_word + (bundle + tl.load(part + 9)) * 4 + block
                columns = pool_word + (bundle + tl.load(part + 10)) * 4
                scales = pool_float + (bundle + tl.load(part + 8)) * 4
                place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
                inner = tl.zeros((SIZE, M), tl.float32)
                for patch in range(tl.load(starts), tl.load(starts + 1)):
                    run = packed + patch * ((SIZE * SIZE // 8) * bits)
                    codes = load_entries(run, place, place >= 0, bits, SIZE * SIZE // 8)
                    weights = (2 * codes - (1 << bits) + 1).to(tl.float16)
                    column = tl.load(columns + patch) * SIZE + tl.arange(0, SIZE)
                    at = x + (variant + m)[None, :] * width + column[:, None]
                    a = tl.load(at)
                    inner += tl.load(scales + patch) * tl.dot(weights, a)
                exponent = tl.load(exponents + variant + m, mask=real, other=0.0)
                total += inner * load_float(part, 4) * exponent[None, :]
        if height != 0:
            add_to(tile_of(y, m, n, y_stride), total, real[None, :] & (n < height)[:, None])
