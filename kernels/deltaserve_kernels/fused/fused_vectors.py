"""Vectors of a module that a delta replaces, such as a norm's weights: one for each row of the step."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.fused.device import parts_of


@triton.jit(do_not_specialize=["site", "key", "width"], do_not_specialize_on_alignment=["row_slots"])
def vectors_kernel(pool_word, pool_field, slots, row_slots, own, out, site, key, width, N: tl.constexpr):
    """out[m] ← the vector that the delta of row m has at a site, or `own`. A program for each row and N columns."""
    m, n = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    known = n < width
    values = tl.load(own + n, mask=known, other=0.0).to(tl.float32)
    slot = tl.load(row_slots + m)
    if slot >= 0:
        bundle, words, start, stop = parts_of(pool_field, slots, slot, site)
        for number in range(start, stop):
            part = words + number * 16
            if tl.load(part) == key:
                bits = tl.load(part + 1).to(tl.int32)
                at = pool_word + (bundle + tl.load(part + 10)) * 4
                short = tl.load(at + n // 2, mask=known & (bits == 16), other=0) >> (n % 2 * 16) << 16
                whole = tl.load(at + n, mask=known & (bits == 32), other=0)
                values = tl.where(bits == 16, short, whole).to(tl.float32, bitcast=True)
    tl.store(out + m.to(tl.int64) * width + n, values.to(out.dtype.element_ty), mask=known)
