"""Device functions that all kernels share: finding a delta's parts, reading a part's fields.

`pool` is any tensor on the device, given once for each type it is read as; a delta lies `slots[slot]` units of 16 bytes
from it. Its first words, int64 [sites + 1], are the numbers of the first part of each site: part p is the words
[16 p, 16 p + 16). All addresses are 16-byte aligned by construction: hence the hints.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_float(words, field):
    """The float32 whose bits a word holds."""
    return tl.load(words + field).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_segment(segments, number):
    """→ slot, first row, rows. `segments` int32 [1 + 3 · n], the first being n."""
    at = segments + 1 + 3 * number
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def row_scales(pool_float, bundle, words, n, known):
    """float32 like n: scale · row[n], 1 where there are no scales of rows."""
    offset = tl.load(words + 3)
    scale = load_float(words, 4)
    rows = tl.load(pool_float + (bundle + offset) * 4 + n, mask=known & (offset != 0), other=1.0)
    return scale * rows


@triton.jit
def parts_of(pool_field, slots, slot, site):
    """→ where the slot's delta lies (in units of 16 bytes), its words, and its first and last + 1 part of a site."""
    bundle = tl.load(slots + slot)
    words = pool_field + bundle * 2
    return bundle, words, tl.load(words + site), tl.load(words + site + 1)


@triton.jit
def tile_of(y, m, n, stride):
    """Pointers [N, M] to y[m, n]."""
    return y + m.to(tl.int64)[None, :] * stride + n[:, None]


@triton.jit
def add_to(to, values, there):
    """Adds float32 `values` where they are `there`, rounded once to what `to` points to."""
    own = tl.load(to, mask=there, other=0.0).to(tl.float32)
    tl.store(to, (own + values).to(to.dtype.element_ty), mask=there)
