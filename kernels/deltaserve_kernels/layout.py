"""Bit order of packed codes, defined here and nowhere else.

    packed[..., j] = Σ_i codes[..., j·P + i] << (i·bits),   P = 8 / bits codes a byte,   bits ∈ {1, 2, 4, 8}

The first code of a row sits in the lowest bits of its first byte; a row starts on a byte of its own; the unused high
bits of a row's last byte are zero. This is the disk form; a kernel may transcode it at load.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED_BITS = (1, 2, 4, 8)


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one packed row of `num_codes` codes."""
    return -(-num_codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n], each < 2**bits → uint8 [..., ceil(n·bits/8)]. Does not change its input."""
    _check_bits(bits)
    per_byte = 8 // bits
    n = codes.shape[-1]
    padded = F.pad(codes.to(torch.uint8), (0, -n % per_byte))
    groups = padded.view(*codes.shape[:-1], packed_bytes(n, bits), per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (groups << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Inverse of `pack`: uint8 [..., ceil(n·bits/8)] → uint8 codes [..., n]."""
    return lookup(packed, torch.arange(2**bits, dtype=torch.uint8, device=packed.device), bits, num_codes)


def lookup(packed: Tensor, table: Tensor, bits: int, num_codes: int) -> Tensor:
    """table[codes]: packed uint8 [R, ceil(n·bits/8)], table [2**bits] → [R, n] of the table's dtype.

    One gather of a whole byte's codes at a time, from a table of 256 rows.
    """
    _check_bits(bits)
    rows = table[_byte_codes(bits, str(packed.device))]  # [256, 8/bits]
    values: Tensor = F.embedding(packed.int(), rows).flatten(-2)
    return values[..., :num_codes]


@cache
def _byte_codes(bits: int, device: str) -> Tensor:
    """int64 [256, 8/bits]: the codes that each byte value holds."""
    byte = torch.arange(256, device=device)[:, None]
    codes: Tensor = byte >> torch.arange(0, 8, bits, device=device) & (2**bits - 1)
    return codes


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"bits {bits}: a packed code has one of {PACKED_BITS} bits")
