"""Tiles and lanes, bit by bit, against Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels.layout import MAX_BITS
from deltaserve_kernels.native.packing import by_sixteen, lanes, tiles, untile

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8], 16: [8, 8]}
PLANES |= {bits: [8, *PLANES[bits - 8]] for bits in range(9, 16)}

sizes = st.integers(1, 70)


def lanes_by_hand(codes: list[int], bits: int) -> list[int]:
    """Plane by plane: lane i of a plane of w bits and n bytes is at bit w · (i div n) of byte i mod n; a plane of one
    bit in 32 lanes has lane i at bit i mod 8 of byte i div 8."""
    packed, count = [], len(codes)
    for width in PLANES[bits]:
        plane = [0] * (count * width // 8)
        for i, code in enumerate(codes):
            straight = width == 1 and count == 32
            byte, shift = divmod(i, 8) if straight else (i % len(plane), i // len(plane) * width)
            for b in range(width):
                plane[byte] |= (code >> b & 1) << shift + b
        packed += plane
        codes = [code >> width for code in codes]
    return packed


@st.composite
def lane_codes(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits, count = draw(st.integers(1, MAX_BITS)), draw(st.sampled_from([16, 32]))
    one = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    return bits, draw(st.lists(one, min_size=1, max_size=3))


@QUICK
@given(lane_codes())
def test_lanes_put_every_bit_where_the_definition_says(case: tuple[int, list[list[int]]]) -> None:
    bits, codes = case
    packed = lanes(torch.tensor(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.tolist() == [lanes_by_hand(one, bits) for one in codes]


@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
@pytest.mark.parametrize("count", [16, 32])
def test_lanes_take_a_bit_for_each_bit(bits: int, count: int) -> None:
    assert lanes(torch.full((2, 3, count), 2**bits - 1), bits).tolist() == [[[255] * (count * bits // 8)] * 3] * 2


@QUICK
@given(sizes, sizes)
def test_tiles_put_every_entry_where_the_definition_says(rows: int, cols: int) -> None:
    """(n, k) is in block n div 32, k div 32; half n mod 32 div 16; pair k mod 32 div 2; lane 2(n mod 16) + k mod 2."""
    packed = tiles(torch.arange(1, rows * cols + 1).view(rows, cols))
    assert packed.is_contiguous()
    assert packed.shape == (-(-rows // 32), -(-cols // 32), 2, 16, 32)
    entries = packed.tolist()
    for n in range(rows):
        for k in range(cols):
            lane = entries[n // 32][k // 32][n % 32 // 16][k % 32 // 2][2 * (n % 16) + k % 2]
            assert lane == n * cols + k + 1
    assert int((packed > 0).sum()) == rows * cols  # the rest is padding


@QUICK
@given(sizes, sizes)
def test_untile_gives_a_matrix_back(rows: int, cols: int) -> None:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).bfloat16()
    assert torch.equal(untile(tiles(matrix), rows, cols), matrix)


@QUICK
@given(sizes, st.lists(st.integers(1, 3), max_size=2))
def test_sixteen_rows_become_lanes(rows: int, more: list[int]) -> None:
    codes = torch.arange(1, 1 + rows * torch.Size(more).numel()).view(rows, *more)
    packed = by_sixteen(codes)
    assert packed.shape == (-(-rows // 16), *more, 16)
    for row in range(packed.shape[0] * 16):
        got = packed[row // 16, ..., row % 16]
        assert torch.equal(got, codes[row] if row < rows else torch.zeros_like(codes[0]))


def test_matrices_of_any_strides_are_read() -> None:
    matrix = torch.arange(40 * 50).view(50, 40).T
    assert torch.equal(tiles(matrix), tiles(matrix.contiguous()))
