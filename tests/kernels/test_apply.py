"""The triangle: decode(term) · x in float64 against the kernels, over every form that a term can have."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.terms import Coded, Grid, LowRank, SeededMask, Term

from .tolerances import RELATIVE_RMS, relative_rms

SHAPES = [(5, 7), (33, 65), (48, 576)]  # rows, cols
TOKENS = [1, 3, 63]
GRIDS: list[tuple[Grid, int]] = [("sign", 1), ("int", 4), ("int", 8), ("float", 16), ("float", 32)]
FORMS = [
    pytest.param(grid, row, col, group, id=f"{grid[0]}{grid[1]}-row={row}-col={col}-group={group}")
    for grid, row, col, group in itertools.product(GRIDS, [None, "tensor", "row"], [False, True], [None, 1, 8])
]


def coded(
    rows: int,
    cols: int,
    grid: Grid = "sign",
    bits: int = 1,
    row: str | None = None,
    col: bool = False,
    group: int | None = None,
    *,
    exact: bool = False,
) -> Coded:
    """A random term in serving form. `exact`: scales are powers of two."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    mask = SeededMask(group, seed=7, site=5) if group else None
    n = mask.num_groups(cols) if mask else cols
    if grid == "float":
        codes = torch.randn(rows, n, generator=generator).to(torch.bfloat16 if bits == 16 else torch.float32)
    else:
        codes = layout.pack(torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8), bits)

    def scales(*shape: int) -> Tensor:
        power = torch.randint(-3, 4, shape, generator=generator)
        return 2.0**power if exact else torch.rand(shape, generator=generator) + 0.5

    row_scale = {None: None, "tensor": scales(), "row": scales(rows, 1).bfloat16()}[row]
    col_scale = scales(cols).bfloat16() if col else None
    return Coded(rows, cols, bits, grid, codes, row=row_scale, col=col_scale, mask=mask).serving()


def low_rank(rows: int, cols: int, rank: int, grid: Grid = "float", bits: int = 16, row: str | None = None) -> LowRank:
    s = torch.linspace(2, 0.5, rank)
    return LowRank(coded(rows, rank, grid, bits, row), s, coded(rank, cols, grid, bits, row))


def activations(tokens: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def definition(x: Tensor, term: Term) -> Tensor:
    """float64 [T, rows]"""
    return x.double() @ term.decode().double().T


def check(term: Term, dtype: torch.dtype) -> None:
    for tokens in TOKENS:
        x = activations(tokens, term.cols, dtype)
        y = apply_term(x, term)
        assert y.dtype == dtype
        assert y.shape == (tokens, term.rows)
        assert relative_rms(y, definition(x, term)) < RELATIVE_RMS[dtype]


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize(("grid", "row", "col", "group"), FORMS)
def test_a_coded_term_is_its_decoded_matrix(
    grid: tuple[Grid, int], row: str | None, col: bool, group: int | None, dtype: torch.dtype
) -> None:
    for rows, cols in SHAPES:
        check(coded(rows, cols, *grid, row, col, group), dtype)


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("grid", [("float", 16), ("int", 4), ("sign", 1)], ids=lambda grid: f"{grid[0]}{grid[1]}")
@pytest.mark.parametrize("row", [None, "row"])
def test_a_low_rank_term_is_its_decoded_matrix(
    rank: int, grid: tuple[Grid, int], row: str | None, dtype: torch.dtype
) -> None:
    for rows, cols in SHAPES:
        check(low_rank(rows, cols, rank, *grid, row), dtype)


@pytest.mark.parametrize(("grid", "bits"), [("sign", 1), ("int", 4)])
@pytest.mark.parametrize("row", [None, "tensor", "row"])
@pytest.mark.parametrize("col", [False, True])
@pytest.mark.parametrize("group", [None, 3])
def test_small_integers_and_powers_of_two_are_exact(
    grid: Grid, bits: int, row: str | None, col: bool, group: int | None
) -> None:
    for rows, cols in SHAPES:
        term = coded(rows, cols, grid, bits, row, col, group, exact=True)
        x = torch.randint(-4, 5, (3, cols), generator=torch.Generator().manual_seed(1)).float()
        assert torch.equal(apply_term(x, term).double(), definition(x, term))


def test_small_integers_are_exact_in_bfloat16() -> None:
    """|y| ≤ 7 columns · 8 · 4 < 256, the last integer before bfloat16 has gaps."""
    for group in (None, 3):
        term = coded(5, 7, "int", 4, "row", group=group, exact=True)
        x = torch.randint(-4, 5, (3, 7), generator=torch.Generator().manual_seed(1)).bfloat16()
        assert torch.equal(apply_term(x, term).double(), definition(x, term))


def test_a_term_that_fits_on_paper() -> None:
    """Row scale 2, 10; column scale 1, 1, 4; signs + − + and − − +."""
    codes = layout.pack(torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.uint8), 1)
    term = Coded(2, 3, 1, "sign", codes, row=torch.tensor([[2.0], [10.0]]), col=torch.tensor([1.0, 1.0, 4.0]))
    assert term.decode().tolist() == [[2, -2, 8], [-10, -10, 40]]
    assert apply_term(torch.tensor([[1.0, 2.0, 3.0]]), term).tolist() == [[22, 90]]


def test_a_masked_term_that_fits_on_paper() -> None:
    """Seed 7, site 5, group 2: columns 0, 3 of row 0 and 1, 3 of row 1. Codes 9, 6 and 8, 15 are 1, −2 and 0, 7."""
    codes = layout.pack(torch.tensor([[9, 6], [8, 15]], dtype=torch.uint8), 4)
    term = Coded(2, 4, 4, "int", codes, mask=SeededMask(2, seed=7, site=5)).serving()
    assert term.decode().tolist() == [[1, 0, 0, -2], [0, 0, 0, 7]]
    assert apply_term(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), term).tolist() == [[-7, 28]]


@pytest.mark.parametrize(
    "term",
    [coded(5, 7, "int", 4, "row", True), coded(5, 7, "int", 4, "row", True, 3), low_rank(5, 7, 2)],
    ids=["coded", "masked", "low-rank"],
)
@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
def test_inputs_are_not_modified(term: Term, dtype: torch.dtype) -> None:
    parts = [term] if isinstance(term, Coded) else [term.left, term.right]
    tensors = [tensor for part in parts for tensor in part.tensors().values()]
    tensors += [part.columns for part in parts if part.columns is not None]
    tensors += [term.s] if isinstance(term, LowRank) else []
    x = activations(3, 7, dtype)
    before = [tensor.clone() for tensor in (x, *tensors)]
    apply_term(x, term)
    term.decode()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *tensors), strict=True))


def test_no_rows_give_no_rows() -> None:
    for term in (coded(5, 7), coded(5, 7, "int", 4, group=3), low_rank(5, 7, 2)):
        assert apply_term(torch.zeros(0, 7), term).shape == (0, 5)


def test_decode_does_not_need_the_serving_form() -> None:
    served = coded(33, 65, "int", 4, "row", group=8)
    assert torch.equal(replace(served, columns=None).decode(), served.decode())


def test_the_spelled_out_mask_takes_two_bytes_an_entry_and_is_counted() -> None:
    stored = replace(coded(33, 65, "int", 4, group=8), columns=None)
    served = stored.serving()
    assert served.columns is not None
    assert served.columns.dtype == torch.int16
    assert served.nbytes == stored.nbytes + 33 * 9 * 2
    assert served.serving() is served


def test_columns_beyond_16_bits_are_kept_whole() -> None:
    """Column 32 767 is the last that int16 can say."""
    for cols in (2**15, 2**15 + 1):
        mask = SeededMask(1, seed=0, site=0)
        codes = torch.zeros(1, cols, dtype=torch.bfloat16)
        columns = Coded(1, cols, 16, "float", codes, mask=mask).serving().columns
        assert columns is not None
        assert columns[0].tolist() == list(range(cols))
