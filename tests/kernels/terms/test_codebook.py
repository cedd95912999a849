"""Codebooks: blocks of a shared table, entry by entry, and the gather-sum that serves them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaserve_kernels import layout
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.terms import Book, Codebook

from ..test_apply import check
from ..tolerances import RELATIVE_RMS

SEEDED = Book()
FORMS = [  # rows, cols, bits, length, tile, signed, stages, turns
    (5, 7, 3, 3, 1, True, 1, 1),
    (5, 7, 4, 3, 2, False, 2, 1),
    (33, 65, 8, 16, 3, True, 1, 1),
    (33, 65, 9, 65, 1, True, 3, 1),
    (33, 65, 7, 16, 1, True, 5, 4),
    (5, 7, 4, 3, 2, False, 3, 2),
    (7, 20, 1, 4, 1, False, 1, 1),
    (7, 20, 12, 4, 7, True, 1, 1),
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def make(
    rows: int,
    cols: int,
    bits: int,
    length: int,
    tile: int,
    signed: bool,
    stages: int,
    turns: int = 1,
    *,
    book: Book = SEEDED,
    scale: str = "row",
    fine: bool = False,
) -> Codebook:
    """`fine`: levels of rows and boosts of columns too."""
    generator = torch.Generator().manual_seed(rows + cols)
    blocks = -(-rows // tile) * -(-cols // length)
    codes = layout.pack(torch.randint(2**bits, (stages * blocks,), generator=generator), bits)
    row = torch.rand((rows, 1) if scale == "row" else (), generator=generator) + 0.5
    gains = 0.5 ** torch.arange(stages) if stages > 1 else None
    term = Codebook(rows, cols, bits, length, book, codes, row, tile, signed, gains, turns=turns)
    if not fine:
        return term
    levels = layout.pack(torch.randint(16, (rows,), generator=generator), 4)
    return replace(term, levels=levels, boosted=torch.tensor([6, 1, 3], dtype=torch.int16), boosts=(1, 0, 2))


def entry(term: Codebook, i: int, j: int) -> float:
    """The definition."""
    tile, r, segment, k = i // term.tile, i % term.tile, j // term.length, j % term.length
    codes = layout.unpack(term.codes, term.bits, term.stages * term.tiles * term.segments)
    table = term.book.table(term.table_bits, term.tile * term.length)
    vectors = 2**term.index_bits
    assert len(table) == term.turns * vectors
    total = 0.0
    for stage, code in enumerate(codes.view(term.stages, term.tiles, term.segments)[:, tile, segment].tolist()):
        sign = -1 if term.signed and code >> term.bits - 1 else 1
        gain = 1.0 if term.gains is None else float(term.gains[stage])
        total += sign * gain * float(table[stage % term.turns * vectors + code % vectors, r * term.length + k])
    total *= float(term.row[i, 0] if term.row.dim() else term.row)
    if term.levels is not None:
        total *= 2 ** ((int(layout.unpack(term.levels, 4, term.rows)[i]) - 8) / 4)
    if term.boosted is not None and j in (columns := term.boosted.tolist()):
        total /= 2 ** (1 if j == columns[0] else 3)
    return total


@pytest.mark.parametrize("scale, fine", [("row", False), ("tensor", False), ("tensor", True)])
@every_form
def test_every_entry_is_the_tables_at_its_code(
    form: tuple[int, int, int, int, int, bool, int], scale: str, fine: bool
) -> None:
    term = make(*form, scale=scale, fine=fine)
    decoded = term.decode()
    assert decoded.shape == form[:2]
    for i in range(0, term.rows, 3):
        for j in (*range(0, term.cols, 5), 1, 3, term.cols - 1):
            assert float(decoded[i, j]) == pytest.approx(entry(term, i, j), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize("scale, fine", [("row", False), ("tensor", True)])
@every_form
def test_the_gather_sum_is_the_decoded_matrix(
    form: tuple[int, int, int, int, int, bool, int], scale: str, fine: bool, dtype: torch.dtype
) -> None:
    check(make(*form, scale=scale, fine=fine).serving(), dtype)


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
def test_a_gaussian_book_is_served_the_same_way(dtype: torch.dtype) -> None:
    for length, bits in [(1, 2), (2, 8), (32, 8)]:
        check(make(9, 70, bits, length, 1, False, 1, book=Book("gaussian")), dtype)


def test_a_codebook_that_fits_on_paper() -> None:
    """Segments of 2 in 3 columns, index 1 and −1, 0 and 1, of two vectors in the plane."""
    (a, b), (c, d) = Book().table(1, 2).tolist()
    codes = layout.pack(torch.tensor([1, 3, 0, 1]), 2)
    term = Codebook(2, 3, 2, 2, Book(), codes, torch.tensor([[1.0], [2.0]]))
    torch.testing.assert_close(term.decode(), torch.tensor([[c, d, -c], [2 * a, 2 * b, 2 * c]]))
    y = apply_term(torch.tensor([[1.0, 10.0, 100.0]]), term)
    torch.testing.assert_close(y, torch.tensor([[c + 10 * d - 100 * c, 2 * a + 20 * b + 200 * c]]))


@every_form
def test_bytes_are_codes_and_scales(form: tuple[int, int, int, int, int, bool, int]) -> None:
    rows, cols, bits, length, tile, _, stages, _ = form
    term = make(*form)
    blocks = -(-rows // tile) * -(-cols // length)
    gains = 4 * stages if stages > 1 else 0
    assert term.nbytes == layout.packed_bytes(stages * blocks, bits) + 4 * rows + gains
    assert term.serving() is term
    assert term.problems() == []
    copy = term.to("cpu", copy=True)
    assert copy.codes.data_ptr() != term.codes.data_ptr()
    assert torch.equal(copy.decode(), term.decode())


def test_no_tokens_give_no_rows() -> None:
    assert apply_term(torch.zeros(0, 7), make(5, 7, 3, 3, 1, True, 1)).shape == (0, 5)
