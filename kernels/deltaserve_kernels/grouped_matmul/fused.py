"""Codes of 1, 2, 4 bits and float16 times activations, many deltas in a launch.

    y[m, n] += s[n, g] · Σ_{k in g} (q[n, k] − z) · x̂[m, k] · 2^e[m]        x̂, its copies, its sums, e: activation_prep

Weights are the left operand of tl.dot, `M` rows of activations the right one (swap-AB). A slot of codes, masked in
place, is read as a subnormal float16, q · 2^(p − 24) with p its lowest bit; x̂ of that slot comes multiplied by 2^−p,
and the 2^24 comes back with the scale: an and-operation for two weights, no shift, no conversion. Slots that end past
bit 10 are read after one shift of the word. The zero point meets Σ x̂. Layout: fused/slots.py. Programs go through
(segments × row tiles) in a loop, so that the number of segments is the device's affair. Sums run in a fixed order, and
a row's result depends on no other row. Rows of a tile past a segment's are not read: with one row, x̂ would be more
traffic than codes.

Tensor cores take float16 subnormals at their full value (Fasi et al. 2021; Khattak and Mikaitis 2025 for sm_90).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.fused.device import add_to, load_float, load_segment, parts_of, row_scales, tile_of


@triton.jit
def _codes(words, x, stride, real, sums, begin, scale_at, zero, superblocks, width,
           BITS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Σ_k (q − z) · x̂, float32 [N, M]. `words`, `x` point to the first superblock's, x in the first copy; `sums` to the
    row's sums. Read are those of its groups, of superblocks if these are smaller, or of 64 columns."""
    SLOTS: tl.constexpr = 16 // BITS
    COLS: tl.constexpr = LANES * SLOTS
    IN_PLACE: tl.constexpr = 8 // BITS if BITS == 4 else 10 // BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) * 65537
    COPY: tl.constexpr = 3 if BITS == 4 else BITS
    SIZE: tl.constexpr = 64 if GROUP == 0 else (GROUP if GROUP < COLS else COLS)
    x += COPY * stride
    sums += width // 8 - 2 * (width // SIZE) + begin // SIZE
    out = tl.zeros((N, M), tl.float32)
    for number in range(superblocks):
        word = tl.load(words + number * (64 * LANES // 2))
        shifted = word >> (IN_PLACE * BITS)
        product = tl.zeros((N, M), tl.float32) if GROUP else out
        for slot in tl.static_range(SLOTS):
            if slot < IN_PLACE:
                codes = word & (MASK << (slot * BITS))
            else:
                codes = shifted & (MASK << ((slot - IN_PLACE) * BITS))
            even = codes.to(tl.int16).to(tl.float16, bitcast=True)
            odd = (codes >> 16).to(tl.int16).to(tl.float16, bitcast=True)
            a = tl.load(x + (number * COLS + slot * LANES), mask=real, other=0.0)
            product = tl.dot(tl.join(even, odd).reshape(N, LANES), a, product)
            if GROUP:
                if (slot + 1) * LANES % GROUP == 0 or slot + 1 == SLOTS:
                    group = (number * COLS + slot * LANES) // GROUP
                    scale = tl.load(scale_at + group * 64)
                    if COLS >= GROUP:
                        total = tl.load(sums + group)
                    else:
                        total = tl.load(sums + number)  # of a superblock
                    out += scale[:, None] * (product * 16777216.0 - zero * total[None, :])  # 2^24
                    product = tl.zeros((N, M), tl.float32)
        if not GROUP:
            out = product
    if not GROUP:
        total = tl.zeros((M,), tl.float32)
        for group in range((superblocks * COLS + 63) // 64):
            total += tl.load(sums + group)
        out = out * 16777216.0 - zero * total[None, :]
    return out


@triton.jit
def _values(values, x, real, superblocks, LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Σ_k w · x̂ of float16 weights."""
    out = tl.zeros((N, M), tl.float32)
    for number in range(superblocks):
        weights = tl.load(values + number * (64 * LANES))
        a = tl.load(x + number * LANES, mask=real, other=0.0)
        out = tl.dot(weights, a, out)
    return out


@triton.jit(do_not_specialize=["site", "key", "rows", "tiles", "width", "y_stride", "stride"])
def grouped_matmul_kernel(
    pool_word, pool_value, pool_float, pool_field, slots, segments, x, sums, exponents, y,
    site, key, rows, tiles, width, y_stride, stride,
    GROUP: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """x, sums, exponents: as activation_prep leaves them, with M rows more than the step has; width and stride in units
    of 128. y [·, y_stride] is added to: all of a delta's parts at once, or with EACH one by one, each from its own
    column on. Segments have at most M rows; `tiles`: row tiles of N that cover the tallest part.
    """
    width, stride = width * 128, stride * 128  # so that the compiler knows what divides them
    column = tl.arange(0, LANES // 2)
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
                superblocks = tl.load(part + 5).to(tl.int32)
                variant = tl.load(part + 6) * rows
                known = tl.minimum(n, (height + 63) // 64 * 64 - 1)
                row = (known // 64) * superblocks * 64 + known % 64
                codes = bundle + tl.load(part + 2)
                packed = pool_word + codes * 4 + (row * (LANES // 2)).to(tl.int64)[:, None] + column[None, :]
                begin = tl.load(part + 13).to(tl.int32) * 128
                at = x + (variant + m)[None, :] * width + begin + tl.arange(0, LANES)[:, None]
                sums_at = sums + (variant + m) * (width // 128 * 15)
                zero = load_float(part, 7)
                bits = tl.load(part + 1)
                scale_at = pool_float + known * 0
                if GROUP:
                    groups = tl.load(part + 15).to(tl.int32)
                    scale_at += (bundle + tl.load(part + 8)) * 4 + (known // 64) * groups * 64 + known % 64
                inner = tl.zeros((N, M), tl.float32)
                if bits == 1:
                    inner = _codes(
                        packed, at, stride, real[None, :], sums_at, begin, scale_at, zero, superblocks, width, 1,
                        GROUP, LANES, M, N,
                    )  # fmt: skip
                elif bits == 2:
                    inner = _codes(
                        packed, at, stride, real[None, :], sums_at, begin, scale_at, zero, superblocks, width, 2,
                        GROUP, LANES, M, N,
                    )  # fmt: skip
                elif bits == 4:
                    inner = _codes(
                        packed, at, stride, real[None, :], sums_at, begin, scale_at, zero, superblocks, width, 4,
                        GROUP, LANES, M, N,
                    )  # fmt: skip
                else:
                    values = pool_value + codes * 8 + (row * LANES).to(tl.int64)[:, None] + tl.arange(0, LANES)[None, :]
                    inner = _values(values, at, real[None, :], superblocks, LANES, M, N)
                exponent = tl.load(exponents + variant + m, mask=real, other=0.0)
                scales = row_scales(pool_float, bundle, part, n, n < height)
                inner = inner * scales[:, None] * exponent[None, :]
                if EACH:
                    to = tile_of(y + tl.load(part + 14), m, n, y_stride)
                    add_to(to, inner, real[None, :] & (n < height)[:, None])
                else:
                    total += tl.where((n < height)[:, None], inner, 0.0)
        if not EACH:
            if height != 0:
                add_to(tile_of(y, m, n, y_stride), total, real[None, :] & (n < height)[:, None])
