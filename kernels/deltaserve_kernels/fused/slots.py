"""How the fused kernels lie codes out in memory; made from the disk form at load.

strided slots    codes of b = 1, 2 or 4 bits, P = 16/b slots, L lanes, S = L·P columns a superblock:

                     code(row, s·S + j·L + l)  in bits [j·b, j·b + b) of the 16-bit lane l

                 int32 word c holds the lanes 2c (low half) and 2c + 1. A slot of all lanes meets L neighbouring columns
                 of x, and a masked slot, read as float16, is a subnormal number q·2^(p − 24): no shift, no conversion.
                 Order: [row tiles of 64][superblocks][64 rows][L/2 words], so a thread's load is 16 bytes.
planes           entries of any width as planes of 8, 4, 2 and 1 bits, lowest bits first: [row tiles][entries][planes]
                 [64 rows · plane bits / 8 bytes]. A row's bits of a plane are neighbours of the next row's.

Rows are padded to 64, columns to superblocks, with zeros: padded rows are cut off by whoever stores a result, padded
columns meet zeros of x. Source: ours: a code that was fetched once must not be moved again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels import layout

ROW_TILE = 64
LANE_BITS = 16


def superblock(bits: int, lanes: int) -> int:
    """Columns of a superblock of `bits`-bit codes, 1, 2, 4 or 16."""
    return lanes * (LANE_BITS // bits)


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def pack_slots(codes: Tensor, bits: int, lanes: int) -> Tensor:
    """uint8 [N, K], each < 2**bits → int32 [tiles, superblocks, 64, lanes / 2]."""
    slots = LANE_BITS // bits
    rows, cols = codes.shape
    whole = F.pad(codes, (0, -cols % superblock(bits, lanes), 0, -rows % ROW_TILE)).int()
    blocks = whole.view(whole.shape[0] // ROW_TILE, ROW_TILE, -1, slots, lanes)
    shifts = torch.arange(0, LANE_BITS, bits, dtype=torch.int32)[:, None]
    lane = (blocks << shifts).sum(3, dtype=torch.int32)  # [tiles, 64, superblocks, lanes]
    words = lane[..., 0::2] | lane[..., 1::2] << LANE_BITS
    return words.transpose(1, 2).contiguous()


def unpack_slots(words: Tensor, bits: int, rows: int, cols: int) -> Tensor:
    """The inverse of `pack_slots`: → uint8 [rows, cols]."""
    lane = torch.stack((words & 0xFFFF, words >> LANE_BITS & 0xFFFF), -1).flatten(-2)  # [tiles, superblocks, 64, lanes]
    shifts = torch.arange(0, LANE_BITS, bits, dtype=torch.int32)[:, None]
    codes = (lane[..., None, :] >> shifts & (1 << bits) - 1).to(torch.uint8)  # [tiles, superblocks, 64, slots, lanes]
    return codes.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :cols]


def pack_values(values: Tensor, lanes: int) -> Tensor:
    """float16 [N, K] → [tiles, ceil(K / lanes), 64, lanes]: a superblock of 16-bit codes has one slot."""
    rows, cols = values.shape
    whole = F.pad(values, (0, -cols % lanes, 0, -rows % ROW_TILE))
    return whole.view(whole.shape[0] // ROW_TILE, ROW_TILE, -1, lanes).transpose(1, 2).contiguous()


def pack_entries(entries: Tensor, bits: int) -> Tensor:
    """int [N, n], each < 2**bits, bits up to 24 → uint8 [tiles, n, 8 · bits]."""
    rows, count = entries.shape
    whole = F.pad(entries, (0, 0, 0, -rows % ROW_TILE)).view(-1, ROW_TILE, count).transpose(1, 2).int()
    parts, rest = [], bits
    for width in plane_widths(bits):
        parts.append(layout.pack(whole & (1 << width) - 1, width))
        whole, rest = whole >> width, rest - width
    assert rest == 0
    return torch.cat(parts, -1)


def unpack_entries(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_entries`: → int32 [rows, n]."""
    tiles, count, _ = packed.shape
    entries = torch.zeros(tiles, count, ROW_TILE, dtype=torch.int32)
    start = shift = 0
    for width in plane_widths(bits):
        stop = start + ROW_TILE * width // 8
        entries |= layout.unpack(packed[..., start:stop].contiguous(), width, ROW_TILE).int() << shift
        start, shift = stop, shift + width
    return entries.transpose(1, 2).flatten(0, 1)[:rows]


def plane_widths(bits: int) -> list[int]:
    """8 as often as it fits, then 4, 2, 1."""
    return [8] * (bits // 8) + [width for width in (4, 2, 1) if bits & width]
