"""The packed form, bit by bit, against Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels.layout import PACKED_BITS, lookup, pack, packed_bytes, unpack

QUICK = settings(max_examples=80, deadline=None, derandomize=True)


def bytes_by_hand(codes: list[int], bits: int) -> list[int]:
    """Bit b of code i is bit i·bits + b of the row."""
    packed = [0] * (-(-len(codes) * bits // 8))
    for i, code in enumerate(codes):
        for b in range(bits):
            position = i * bits + b
            packed[position // 8] |= (code >> b & 1) << position % 8
    return packed


@st.composite
def coded_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.sampled_from(PACKED_BITS))
    length = draw(st.integers(1, 19))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    return bits, draw(st.lists(row, min_size=1, max_size=4))


@QUICK
@given(coded_rows())
def test_pack_puts_every_bit_where_the_definition_says(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    packed = pack(torch.tensor(rows, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [bytes_by_hand(row, bits) for row in rows]
    assert packed.shape[1] == packed_bytes(len(rows[0]), bits)


@QUICK
@given(coded_rows())
def test_unpack_returns_what_pack_got(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    restored = unpack(pack(codes, bits), bits, codes.shape[1])
    assert restored.dtype == torch.uint8
    assert restored.tolist() == rows


@QUICK
@given(coded_rows())
def test_lookup_is_the_table_at_the_codes(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    table = torch.arange(2**bits, dtype=torch.float32) * 0.5 - 3
    assert torch.equal(lookup(pack(codes, bits), table, bits, codes.shape[1]), table[codes.long()])


def test_the_bytes_of_the_format_are_frozen() -> None:
    assert pack(torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.uint8), 1).tolist() == [[0b1101, 1]]
    assert pack(torch.tensor([[1, 2, 3, 0, 2]], dtype=torch.uint8), 2).tolist() == [[0b00_11_10_01, 2]]
    assert pack(torch.tensor([[1, 15, 7]], dtype=torch.uint8), 4).tolist() == [[0xF1, 0x07]]
    assert pack(torch.tensor([[200, 5]], dtype=torch.uint8), 8).tolist() == [[200, 5]]


def test_a_row_starts_on_a_byte_of_its_own() -> None:
    assert pack(torch.ones(3, 9, dtype=torch.uint8), 1).tolist() == [[255, 1]] * 3


def test_pack_keeps_its_input_and_takes_any_stride() -> None:
    codes = torch.randint(0, 16, (8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = codes.clone()
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
    pack(codes, 4)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_a_matrix_without_entries_packs_to_no_bytes(shape: tuple[int, int]) -> None:
    packed = pack(torch.zeros(shape, dtype=torch.uint8), 1)
    assert packed.shape == (shape[0], packed_bytes(shape[1], 1))
    assert packed.numel() == 0


@pytest.mark.parametrize("bits", [0, 3, 5, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits {bits}"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits {bits}"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), bits, 8)
