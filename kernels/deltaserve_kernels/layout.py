"""Bit order of packed codes, defined here and nowhere else.

    bits ∈ {1, 2, 4, 8}    packed[..., j] = Σ_i codes[..., j·P + i] << (i·bits),   P = 8 / bits codes a byte
    any other 3 … 16       planes of 8, 4, 2 and 1 bits, the widest first, one after the other: the first plane holds
                           the lowest bits of every code (3 = 2 + 1, 12 = 8 + 4, 16 = 8 + 8)

The first code of a row sits in the lowest bits of its first byte; a row starts on a byte of its own, and so does a
plane; the unused high bits of a plane's last byte are zero. This is the disk form; a kernel may transcode it at load.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PLANE_BITS = (8, 4, 2, 1)
MAX_BITS = 16


@cache
def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, the lowest bits first."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits {bits}: a packed code has 1 … {MAX_BITS} bits")
    widths: list[int] = []
    while (rest := bits - sum(widths)) > 0:
        widths.append(next(width for width in PLANE_BITS if width <= rest))
    return tuple(widths)


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one packed row of `num_codes` codes."""
    return sum(-(-num_codes * width // 8) for width in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes [..., n], each < 2**bits → uint8 [..., packed_bytes(n, bits)]. Does not change its input."""
    widths = planes(bits)
    if len(widths) == 1:
        return _pack_plane(codes.to(torch.uint8), bits)
    rest, parts = codes.int(), []
    for width in widths:
        parts.append(_pack_plane((rest & (2**width - 1)).to(torch.uint8), width))
        rest = rest >> width
    return torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Inverse of `pack`: → codes [..., n], uint8 up to 8 bits, int32 above."""
    widths = planes(bits)
    if len(widths) == 1:
        return _lookup_plane(packed, torch.arange(2**bits, dtype=torch.uint8, device=packed.device), bits, num_codes)
    codes = torch.zeros(*packed.shape[:-1], num_codes, dtype=torch.int32, device=packed.device)
    start = shift = 0
    for width in widths:
        stop = start + packed_bytes(num_codes, width)
        codes |= unpack(packed[..., start:stop], width, num_codes).int() << shift
        start, shift = stop, shift + width
    return codes if bits > 8 else codes.to(torch.uint8)


def lookup(packed: Tensor, table: Tensor, bits: int, num_codes: int) -> Tensor:
    """table[codes]: packed uint8 [R, packed_bytes(n, bits)], table [2**bits] → [R, n] of the table's dtype."""
    if len(planes(bits)) == 1:
        return _lookup_plane(packed, table, bits, num_codes)
    return table[unpack(packed, bits, num_codes).long()]


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    n = codes.shape[-1]
    padded = F.pad(codes, (0, -n % (8 // bits)))
    groups = padded.view(*codes.shape[:-1], -(-n * bits // 8), 8 // bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (groups << shifts).sum(-1, dtype=torch.uint8)


def _lookup_plane(packed: Tensor, table: Tensor, bits: int, num_codes: int) -> Tensor:
    """One gather of a whole byte's codes at a time, from a table of 256 rows."""
    rows = table[_byte_codes(bits, str(packed.device))]  # [256, 8/bits]
    values: Tensor = F.embedding(packed.int(), rows).flatten(-2)
    return values[..., :num_codes]


@cache
def _byte_codes(bits: int, device: str) -> Tensor:
    """int64 [256, 8/bits]: the codes that each byte value holds."""
    byte = torch.arange(256, device=device)[:, None]
    codes: Tensor = byte >> torch.arange(0, 8, bits, device=device) & (2**bits - 1)
    return codes
