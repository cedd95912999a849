"""x → x̂ float16, its copies, its sums and 2^e: see naive.py. One launch for a layer's input, one for its variants.

x̂ lies as float16 [copies, variants, rows, width], sums as float32 [variants, rows, 15 · width / 128]: those of 16
columns first, then of 32, 64, 128; exponents as float32 [variants, rows]. `stride`: from one copy to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.fused.device import load_segment, parts_of


@triton.jit
def _load(x, at, known, columns, picked, factors, scaled):
    """float32: x[columns[at]] · factors[at], or without the one or the other"""
    place = tl.where(picked, tl.load(columns + at, mask=known & picked, other=0), at)
    values = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
    return values * tl.load(factors + at, mask=known & scaled, other=1.0)


@triton.jit
def _copy(out, at, values, width, BITS: tl.constexpr, LANES: tl.constexpr):
    """x̂ · 2^−p"""
    KEPT: tl.constexpr = 8 // BITS if BITS == 4 else 10 // BITS
    slot = at // LANES % (16 // BITS)
    low = tl.where(slot < KEPT, slot, slot - KEPT) * BITS
    factor = ((127 - low) << 23).to(tl.float32, bitcast=True)
    tl.store(out + at, (values.to(tl.float32) * factor).to(tl.float16), mask=at < width)


@triton.jit
def _store_sums(sums, start, own, width, SIZE: tl.constexpr, COUNT: tl.constexpr):
    at = start // SIZE + tl.arange(0, COUNT)
    tl.store(sums + width // 8 - 2 * (width // SIZE) + at, own, mask=at < width // SIZE)


@triton.jit
def _sums(sums, start, values, width, BLOCK: tl.constexpr):
    """Over 16, 32, 64 and 128 columns."""
    of_16 = tl.sum(values.to(tl.float32).reshape(BLOCK // 16, 16), 1)
    of_32 = tl.sum(of_16.reshape(BLOCK // 32, 2), 1)
    of_64 = tl.sum(of_32.reshape(BLOCK // 64, 2), 1)
    of_128 = tl.sum(of_64.reshape(BLOCK // 128, 2), 1)
    _store_sums(sums, start, of_16, width, 16, BLOCK // 16)
    _store_sums(sums, start, of_32, width, 32, BLOCK // 32)
    _store_sums(sums, start, of_64, width, 64, BLOCK // 64)
    _store_sums(sums, start, of_128, width, 128, BLOCK // 128)


@triton.jit
def _row(x, out, sums, exponent, columns, picked, factors, scaled, cols, width, stride,
         LANES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row of `cols`, zeros up to `width`."""
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.abs(_load(x, at, at < cols, columns, picked, factors, scaled)))
    biased = tl.maximum(tl.max(peak, 0).to(tl.int32, bitcast=True) >> 23, 27)  # exponent + 127
    shrink = ((267 - biased) << 23).to(tl.float32, bitcast=True)  # 2^(13 − exponent)
    tl.store(exponent, ((biased - 13) << 23).to(tl.float32, bitcast=True))
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = (_load(x, at, at < cols, columns, picked, factors, scaled) * shrink).to(tl.float16)
        tl.store(out + at, values, mask=at < width)
        _copy(out + stride, at, values, width, 1, LANES)
        _copy(out + 2 * stride, at, values, width, 2, LANES)
        _copy(out + 3 * stride, at, values, width, 4, LANES)
        _sums(sums, start, values, width, BLOCK)


@triton.jit(do_not_specialize=["cols", "width", "stride"])
def activation_prep_kernel(
    x, columns, factors, out, sums, exponents, cols, width, stride, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    """x [programs, cols] → its x̂: a program for each row. `columns`, `factors`: any int32 and float32, not read."""
    row = tl.program_id(0).to(tl.int64)
    own, exponent = sums + row * (width // 128 * 15), exponents + row
    _row(
        x + row * cols,
        out + row * width,
        own,
        exponent,
        columns,
        False,
        factors,
        False,
        cols,
        width,
        stride,
        LANES,
        BLOCK,
    )


@triton.jit(do_not_specialize=["site", "key", "rows", "cols", "width", "stride"])
def variant_prep_kernel(
    pool_word, pool_float, pool_field, slots, segments, x, out, sums, exponents, site, key, rows, cols, width, stride,
    LANES: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Of segments of one row: x [rows, cols] → for each matching part its variant's x̂."""
    for item in range(tl.program_id(0), tl.load(segments), PROGRAMS):
        slot, row, _count = load_segment(segments, item)
        bundle, words, start, stop = parts_of(pool_field, slots, slot, site)
        for number in range(start, stop):
            part = words + number * 16
            if tl.load(part) == key:
                to = tl.load(part + 6) * rows + row
                count = tl.load(part + 5).to(tl.int32)
                count = tl.where(count < 0, cols, count)  # all of them
                picks, scales = tl.load(part + 9), tl.load(part + 10)
                _row(
                    x + row.to(tl.int64) * cols, out + to * width, sums + to * (width // 128 * 15), exponents + to,
                    pool_word + (bundle + picks) * 4, picks != 0, pool_float + (bundle + scales) * 4, scales != 0,
                    count, width, stride, LANES, BLOCK,
                )  # fmt: skip
