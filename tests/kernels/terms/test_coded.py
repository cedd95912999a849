"""Grids of every width, scales of groups of columns, stored masks: each entry by the formula, then the kernels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from deltaserve_kernels import layout
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.terms import Coded, ExplicitMask, Grid, SeededMask
from deltaserve_kernels.terms.masks import place_bits

from ..tolerances import RELATIVE_RMS, relative_rms

SHAPES = [(5, 7), (33, 65)]
GRIDS: list[tuple[Grid, int]] = [
    *[("odd", bits) for bits in (2, 3, 4, 5, 8)],
    *[("int", bits) for bits in (2, 3, 6, 7)],
    *[("table", bits) for bits in (1, 2, 3, 8)],
]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make(
    rows: int, cols: int, grid: Grid, bits: int, group: int | None = None, mask: SeededMask | ExplicitMask | None = None
) -> Coded:
    n = mask.num_survivors(cols) if mask else cols
    return Coded(
        rows,
        cols,
        bits,
        grid,
        layout.pack(torch.randint(0, 2**bits, (rows, n), generator=generator()), bits),
        row=torch.rand(rows, -(-cols // group), generator=generator()).bfloat16() + 0.5 if group else None,
        mask=mask,
        group=group,
        table=torch.randn(2**bits, generator=generator()) if grid == "table" else None,
    )


def explicit(rows: int, cols: int, group: int, keep: int) -> ExplicitMask:
    columns = SeededMask(group, 1, 2, keep=keep).columns(rows, cols)
    return ExplicitMask(group, layout.pack(columns % group, place_bits(group)), keep=keep)


def level(term: Coded, code: int) -> float:
    if term.grid == "table":
        assert term.table is not None
        return float(term.table[code])
    return 2 * code - 2**term.bits + 1 if term.grid == "odd" else code - 2 ** (term.bits - 1)


def entries(term: Coded) -> list[list[float]]:
    """The definition, entry by entry."""
    codes = layout.unpack(term.codes, term.bits, term.num_codes).tolist()
    columns = term.mask.columns(term.rows, term.cols).tolist() if term.mask else [range(term.cols)] * term.rows
    matrix = [[0.0] * term.cols for _ in range(term.rows)]
    for i, (line, places) in enumerate(zip(codes, columns, strict=True)):
        for code, j in zip(line, places, strict=True):
            scale = float(term.row[i, j // (term.group or term.cols)]) if term.row is not None else 1.0
            matrix[i][j] = level(term, code) * scale
    return matrix


def check_against_definition(term: Coded) -> None:
    matrix = torch.tensor(entries(term), dtype=torch.float64)
    torch.testing.assert_close(term.decode().double(), matrix, rtol=1e-6, atol=0)
    for tokens, dtype in itertools.product((1, 3), RELATIVE_RMS):
        x = torch.randn(tokens, term.cols, generator=generator()).to(dtype)
        y = apply_term(x, term.serving())
        assert (y.shape, y.dtype) == ((tokens, term.rows), dtype)
        assert relative_rms(y, x.double() @ matrix.T) < RELATIVE_RMS[dtype]


@pytest.mark.parametrize("group", [None, 1, 4, 64], ids=lambda group: f"group={group}")
@pytest.mark.parametrize(("grid", "bits"), GRIDS)
def test_a_coded_term_is_what_its_grid_and_scales_say(grid: Grid, bits: int, group: int | None) -> None:
    for rows, cols in SHAPES:
        check_against_definition(make(rows, cols, grid, bits, group))


@pytest.mark.parametrize(("group", "keep"), [(4, 2), (7, 3), (300, 5)])
@pytest.mark.parametrize(("grid", "bits"), [("odd", 2), ("int", 4), ("table", 3)])
def test_a_masked_term_is_what_its_grid_and_places_say(grid: Grid, bits: int, group: int, keep: int) -> None:
    for rows, cols in SHAPES:
        check_against_definition(make(rows, cols, grid, bits, mask=SeededMask(group, 1, 2, keep=keep, tile=2)))
        check_against_definition(make(rows, cols, grid, bits, mask=explicit(rows, cols, group, keep)))


def test_odd_and_table_grids_on_paper() -> None:
    codes = layout.pack(torch.tensor([[0, 1, 2, 3]]), 2)
    assert Coded(1, 4, 2, "odd", codes).decode().tolist() == [[-3, -1, 1, 3]]
    table = torch.tensor([-2.0, -0.5, 0.0, 7.0])
    assert Coded(1, 4, 2, "table", codes, table=table).decode().tolist() == [[-2, -0.5, 0, 7]]
    scales = torch.tensor([[1.0, 2.0]])
    assert Coded(1, 4, 2, "odd", codes, row=scales, group=3).decode().tolist() == [[-3, -1, 1, 6]]


def test_a_group_far_wider_than_the_matrix_is_a_scale_of_its_row() -> None:
    term = make(5, 7, "odd", 2, group=2**40)
    assert torch.equal(term.decode(), replace(term, group=None).decode())


def test_two_of_four_on_paper() -> None:
    """Places 1 3 · 0 and 0 1 · 0; the last group has one column."""
    mask = ExplicitMask(4, layout.pack(torch.tensor([[1, 3, 0], [0, 1, 0]]), 2), keep=2)
    term = Coded(2, 5, 4, "int", layout.pack(torch.tensor([[9, 6, 15], [8, 7, 10]]), 4), mask=mask)
    assert term.decode().tolist() == [[0, 1, 0, -2, 7], [0, -1, 0, 0, 2]]
    assert term.problems() == []


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ([[0, 1, 0], [3, 1, 0]], "mask: the places of a row are not ascending"),
        ([[0, 1, 0], [1, 1, 0]], "mask: the places of a row are not ascending"),
        ([[0, 1, 1], [0, 1, 0]], "mask: a place past the last of 5 columns"),
    ],
)
def test_places_that_no_kernel_may_read_are_named(places: list[list[int]], problem: str) -> None:
    mask = ExplicitMask(4, layout.pack(torch.tensor(places), 2), keep=2)
    assert replace(make(2, 5, "int", 4, mask=explicit(2, 5, 4, 2)), mask=mask).problems() == [problem]


def test_bytes_are_those_of_the_tensors() -> None:
    term = make(5, 7, "table", 3, group=4)
    assert term.row is not None
    assert term.nbytes == 5 * 3 + 5 * 2 * 2 + 8 * 4 == sum(tensor.nbytes for tensor in term.tensors().values())
    masked = make(5, 7, "int", 4, mask=explicit(5, 7, 4, 2))
    assert masked.nbytes == 5 * 2 + 5 * 1
    assert masked.serving().nbytes == masked.nbytes + 5 * 4 * 2
    assert sorted(masked.tensors()) == ["codes", "mask.places"]
    assert sorted(masked.serving().tensors(derived=True)) == ["codes", "columns", "mask.places"]


def test_a_copy_shares_no_memory() -> None:
    term = make(5, 7, "int", 4, mask=explicit(5, 7, 4, 2)).serving()
    copy = term.to("cpu", copy=True)
    named = zip(term.tensors(derived=True).items(), copy.tensors(derived=True).items(), strict=True)
    for (name, tensor), (copied_name, copied) in named:
        assert (name, tensor.data_ptr() != copied.data_ptr()) == (copied_name, True)
        assert torch.equal(tensor, copied)
    assert torch.equal(copy.decode(), term.decode())
