"""Terms on some column blocks: where they lie, and that the other columns do not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaserve_kernels import layout
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.terms import Coded, Placed, SeededMask

from ..test_apply import check
from ..tolerances import RELATIVE_RMS


def make(rows: int, cols: int, block: int, blocks: list[int], group: int | None = None) -> Placed:
    width = sum(min(block, cols - b * block) for b in blocks)
    mask = SeededMask(group, 1, 2) if group else None
    n = mask.num_survivors(width) if mask else width
    codes = torch.randint(0, 16, (rows, n), generator=torch.Generator().manual_seed(cols))
    term = Coded(rows, width, 4, "int", layout.pack(codes, 4), row=torch.tensor(0.5), mask=mask)
    present = torch.zeros(1, -(-cols // block), dtype=torch.uint8)
    present[0, blocks] = 1
    return Placed(term, cols, block, layout.pack(present, 1)[0])


CASES = [
    (5, 7, 2, [0, 3]),  # the last block has one column
    (5, 7, 2, [1]),
    (33, 65, 16, [0, 1, 2, 3, 4]),
    (33, 65, 1, [3, 64]),
    (4, 3, 8, [0]),
]


@pytest.mark.parametrize("group", [None, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_lie_in_their_blocks(case: tuple[int, int, int, list[int]], group: int | None) -> None:
    rows, cols, block, blocks = case
    term = make(*case, group=group)
    columns = [b * block + c for b in blocks for c in range(block) if b * block + c < cols]
    inner = term.term.decode()
    expected = [[float(inner[i, columns.index(j)]) if j in columns else 0.0 for j in range(cols)] for i in range(rows)]
    assert term.decode().tolist() == expected
    assert term.problems() == []
    for dtype in RELATIVE_RMS:
        check(term.serving(), dtype)


def test_a_placed_term_that_fits_on_paper() -> None:
    """Blocks of 2 in 5 columns, the second and the third."""
    codes = layout.pack(torch.tensor([[9, 10, 11], [7, 8, 6]]), 4)
    term = Placed(Coded(2, 3, 4, "int", codes), 5, 2, torch.tensor([0b110], dtype=torch.uint8))
    assert term.decode().tolist() == [[0, 0, 1, 2, 3], [0, 0, -1, 0, -2]]
    assert apply_term(torch.tensor([[1.0, 2, 3, 4, 5]]), term.serving()).tolist() == [[26, -13]]


def test_blocks_and_columns_that_do_not_add_up_are_named() -> None:
    term = make(5, 7, 2, [0, 3])
    more = replace(term, present=torch.tensor([0b1101], dtype=torch.uint8))
    assert more.problems() == ["a term of 3 columns in blocks of 5"]


def test_a_block_far_wider_than_the_matrix_is_the_matrix() -> None:
    term = make(4, 3, 8, [0])
    assert torch.equal(replace(term, block=2**40).decode(), term.decode())


def test_bytes_are_the_terms_and_one_bit_a_block() -> None:
    term = make(5, 65, 4, [0, 16], group=2)
    assert term.nbytes == term.term.nbytes + 3
    assert term.serving().nbytes == term.nbytes + 5 * 3 * 2 + 5 * 8  # the mask, and the columns, spelled out
    assert sorted(term.serving().tensors(derived=True)) == [
        "columns",
        "present",
        "term.codes",
        "term.columns",
        "term.row",
    ]
    copy = term.serving().to("cpu", copy=True)
    assert torch.equal(copy.decode(), term.decode())
    assert copy.present.data_ptr() != term.present.data_ptr()
