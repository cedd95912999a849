"""What a delta does to the base's own product: the first kernel of a site."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.fused.device import load_segment, parts_of, row_scales


@triton.jit(do_not_specialize=["site", "key", "tiles", "y_stride"])
def rescale_kernel(
    pool_float, pool_field, slots, segments, bias, y, site, key, tiles, y_stride,
    BIAS: tl.constexpr, N: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """y[m, n] ← (y − b) · s[n] + b, in float32; segments of one row."""
    for item in range(tl.program_id(0), tl.load(segments) * tiles, PROGRAMS):
        slot, m, _count = load_segment(segments, item // tiles)
        n = (item % tiles) * N + tl.arange(0, N)
        bundle, words, start, stop = parts_of(pool_field, slots, slot, site)
        for number in range(start, stop):
            part = words + number * 16
            if tl.load(part) == key:
                known = n < tl.load(part + 12)
                to = y + m.to(tl.int64) * y_stride + n
                value = tl.load(to, mask=known, other=0.0).to(tl.float32)
                scales = row_scales(pool_float, bundle, part, n, known)
                if BIAS:
                    own = tl.load(bias + n, mask=known, other=0.0).to(tl.float32)
                    value = (value - own) * scales + own
                else:
                    value = value * scales
                tl.store(to, value.to(y.dtype.element_ty), mask=known)
