"""The serving layouts against their definition, one bit at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaserve_kernels.fused import slots

SIZES = st.integers(1, 130)


def codes(rows: int, cols: int, bits: int) -> torch.Tensor:
    return torch.randint(2**bits, (rows, cols), generator=torch.Generator().manual_seed(rows * cols + bits))


@given(SIZES, SIZES, st.sampled_from([1, 2, 4]), st.sampled_from([16, 32]))
def test_every_code_lies_in_its_slot(rows: int, cols: int, bits: int, lanes: int) -> None:
    given_codes = codes(rows, cols, bits)
    words = slots.pack_slots(given_codes.to(torch.uint8), bits, lanes)
    width = lanes * 16 // bits
    assert words.shape == (-(-rows // 64), -(-cols // width), 64, lanes // 2)
    for row in {0, rows // 2, rows - 1}:
        for col in {0, cols // 3, cols - 1}:
            block, rest = divmod(col, width)
            slot, lane = divmod(rest, lanes)
            word = int(words[row // 64, block, row % 64, lane // 2]) & 0xFFFFFFFF
            assert word >> (16 * (lane % 2) + slot * bits) & (1 << bits) - 1 == given_codes[row, col]
    assert torch.equal(slots.unpack_slots(words, bits, rows, cols), given_codes.to(torch.uint8))


@given(SIZES, SIZES, st.sampled_from([1, 2, 4]))
def test_what_pads_is_zero(rows: int, cols: int, bits: int) -> None:
    words = slots.pack_slots(codes(rows, cols, bits).to(torch.uint8), bits, 32)
    tiles, blocks = words.shape[:2]
    whole = slots.unpack_slots(words, bits, tiles * 64, blocks * slots.superblock(bits, 32))
    assert not whole[rows:].any()
    assert not whole[:, cols:].any()


@given(SIZES, st.integers(1, 20), st.integers(1, 24))
def test_entries_come_back(rows: int, count: int, bits: int) -> None:
    entries = codes(rows, count, bits)
    packed = slots.pack_entries(entries, bits)
    assert packed.shape == (-(-rows // 64), count, 8 * bits)
    assert torch.equal(slots.unpack_entries(packed, bits, rows), entries.int())


@pytest.mark.parametrize("bits", [3, 12, 21])
def test_a_plane_of_an_entry_is_where_the_kernel_reads_it(bits: int) -> None:
    entries = codes(70, 5, bits)
    packed = slots.pack_entries(entries, bits)
    row, entry, low = 67, 3, 0
    for width in slots.plane_widths(bits):
        byte = int(packed[1, entry, 8 * low + (row - 64) * width // 8])
        plane = byte >> (row - 64) * width % 8 & (1 << width) - 1
        assert plane == int(entries[row, entry]) >> low & (1 << width) - 1
        low += width
    assert low == bits


def test_values_lie_tile_by_tile() -> None:
    values = torch.randn(70, 50).half()
    packed = slots.pack_values(values, 32)
    assert packed.shape == (2, 2, 64, 32)
    assert packed[1, 1, 5, 17] == values[69, 49]
    assert not packed[1, :, 6:].any()
