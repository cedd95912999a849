"""The serving order of codes and weights, as src/unpack.c and src/product.c read them.

    tiles   [N, K] → [N/32, K/32, 2, 16, 32]: 32 rows as two halves of 16; 16 pairs of columns; lane 2·n + (k mod 2)
    lanes   the codes of 32 (or 16) lanes, plane by plane, the lowest bits first: planes of 8, 4, 2 and 1 bits;
            lane i of a plane of w bits is in byte i mod n, shifted by w · (i div n), n = lanes · w / 8; 1 bit in
            32 lanes: bit i

A matrix is padded with zeros to whole tiles; codes of padded places are code 0, and what they stand for is never read:
padded columns meet zero activations, padded rows are not written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_kernels.layout import planes


def tiles(matrix: Tensor) -> Tensor:
    """[N, K] → [ceil(N/32), ceil(K/32), 2, 16, 32], contiguous."""
    rows, cols = matrix.shape
    whole = F.pad(matrix, (0, -cols % 32, 0, -rows % 32))
    split = whole.view(-(-rows // 32), 2, 16, -(-cols // 32), 16, 2)  # block, half, n, block of columns, pair, parity
    return split.permute(0, 3, 1, 4, 2, 5).reshape(split.shape[0], split.shape[3], 2, 16, 32)


def untile(packed: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `tiles`."""
    split = packed.view(packed.shape[0], packed.shape[1], 2, 16, 16, 2).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(packed.shape[0] * 32, packed.shape[1] * 32)[:rows, :cols]


def by_sixteen(codes: Tensor) -> Tensor:
    """[rows, …] → [ceil(rows/16), …, 16]: rows as lanes."""
    padded = F.pad(codes, (*(0, 0) * (codes.dim() - 1), 0, -len(codes) % 16))
    return padded.view(-1, 16, *codes.shape[1:]).movedim(1, -1)


def lanes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., 32 or 16] → uint8 [..., lanes · bits / 8], contiguous."""
    count, rest, parts = codes.shape[-1], codes.int(), []
    for width in planes(bits):
        plane = rest & (2**width - 1)
        size = count * width // 8
        if width == 1 and count == 32:
            grouped = plane.reshape(*plane.shape[:-1], 4, 8) << torch.arange(8, dtype=torch.int32)
            parts.append(grouped.sum(-1))
        else:
            shifts = torch.arange(0, 8, width, dtype=torch.int32)[:, None]
            parts.append((plane.reshape(*plane.shape[:-1], 8 // width, size) << shifts).sum(-2))
        rest = rest >> width
    return torch.cat(parts, -1).to(torch.uint8).contiguous()
