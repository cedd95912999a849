"""The packed form, bit by bit, against Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels.layout import MAX_BITS, lookup, pack, packed_bytes, unpack

QUICK = settings(max_examples=80, deadline=None, derandomize=True)
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8], 16: [8, 8]}
PLANES |= {bits: [8, *PLANES[bits - 8]] for bits in range(9, 16)}


def bytes_by_hand(codes: list[int], bits: int) -> list[int]:
    """Plane by plane, the widest with the lowest bits first; bit b of code i is bit i·width + b of its plane."""
    packed = []
    for width in PLANES[bits]:
        plane = [0] * (-(-len(codes) * width // 8))
        for i, code in enumerate(codes):
            for b in range(width):
                position = i * width + b
                plane[position // 8] |= (code >> b & 1) << position % 8
        packed += plane
        codes = [code >> width for code in codes]
    return packed


@st.composite
def coded_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.integers(1, MAX_BITS))
    length = draw(st.integers(1, 19))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    return bits, draw(st.lists(row, min_size=1, max_size=4))


@QUICK
@given(coded_rows())
def test_pack_puts_every_bit_where_the_definition_says(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    packed = pack(torch.tensor(rows), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [bytes_by_hand(row, bits) for row in rows]
    assert packed.shape[1] == packed_bytes(len(rows[0]), bits)


@QUICK
@given(coded_rows())
def test_unpack_returns_what_pack_got(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows)
    restored = unpack(pack(codes, bits), bits, codes.shape[1])
    assert restored.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert restored.tolist() == rows


@QUICK
@given(coded_rows())
def test_lookup_is_the_table_at_the_codes(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows)
    table = torch.arange(2**bits, dtype=torch.float32) * 0.5 - 3
    assert torch.equal(lookup(pack(codes, bits), table, bits, codes.shape[1]), table[codes.long()])


def test_the_bytes_of_the_format_are_frozen() -> None:
    assert pack(torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.uint8), 1).tolist() == [[0b1101, 1]]
    assert pack(torch.tensor([[1, 2, 3, 0, 2]], dtype=torch.uint8), 2).tolist() == [[0b00_11_10_01, 2]]
    assert pack(torch.tensor([[1, 15, 7]], dtype=torch.uint8), 4).tolist() == [[0xF1, 0x07]]
    assert pack(torch.tensor([[200, 5]], dtype=torch.uint8), 8).tolist() == [[200, 5]]
    assert pack(torch.tensor([[0b101, 0b110, 0b011]]), 3).tolist() == [[0b11_10_01, 0b011]]
    assert pack(torch.tensor([[0xABC, 0xDEF]]), 12).tolist() == [[0xBC, 0xEF, 0xDA]]
    assert pack(torch.tensor([[0x1234, 0xFFFE]]), 16).tolist() == [[0x34, 0xFE, 0x12, 0xFF]]


@QUICK
@given(coded_rows())
def test_codes_of_any_integer_type_pack_to_the_same_bytes(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    types = [torch.int32, torch.int64] if bits > 8 else [torch.uint8, torch.int16, torch.int64]
    packed = [pack(torch.tensor(rows, dtype=dtype), bits) for dtype in types]
    assert all(torch.equal(other, packed[0]) for other in packed[1:])


def test_a_row_starts_on_a_byte_of_its_own() -> None:
    assert pack(torch.ones(3, 9, dtype=torch.uint8), 1).tolist() == [[255, 1]] * 3


def test_pack_keeps_its_input_and_takes_any_stride() -> None:
    codes = torch.randint(0, 16, (8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = codes.clone()
    for bits in (4, 5):
        assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
        pack(codes, bits)
        assert torch.equal(codes, before)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_a_matrix_without_entries_packs_to_no_bytes(shape: tuple[int, int]) -> None:
    for bits in (1, 3, 12):
        packed = pack(torch.zeros(shape, dtype=torch.uint8), bits)
        assert packed.shape == (shape[0], packed_bytes(shape[1], bits))
        assert packed.numel() == 0
        assert unpack(packed, bits, shape[1]).shape == shape


@pytest.mark.parametrize("bits", [-1, 0, 17, 32])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits {bits}"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits {bits}"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), bits, 8)
