"""Block transforms: their matrices by the textbook, and terms between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaserve_kernels import layout
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.terms import Book, Codebook, Coded, Patches, Placed, Rotated, Rotation, Term

from ..test_apply import check
from ..tolerances import RELATIVE_RMS


def hadamard(n: int) -> list[list[float]]:
    return [[(-1) ** (i & j).bit_count() / math.sqrt(n) for j in range(n)] for i in range(n)]


def dct(n: int) -> list[list[float]]:
    """DCT-II: row k is cos(π (2j + 1) k / 2n), normalised."""
    return [
        [math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * j + 1) * k / (2 * n)) for j in range(n)]
        for k in range(n)
    ]


def block_diagonal(rotation: Rotation, n: int) -> Tensor:
    """T [n, n], float64."""
    blocks, rest = [rotation.size] * (n // rotation.size), n % rotation.size
    if rotation.kind == "hadamard":
        blocks += [1 << bit for bit in reversed(range(rotation.size.bit_length())) if rest >> bit & 1]
    elif rest:
        blocks.append(rest)
    of = hadamard if rotation.kind == "hadamard" else dct
    return torch.block_diag(*(torch.tensor(of(size), dtype=torch.float64) for size in blocks))


rotations = st.one_of(
    st.builds(Rotation, st.just("hadamard"), st.sampled_from([1, 2, 4, 8, 16])),
    st.builds(Rotation, st.just("dct"), st.integers(1, 16)),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rotation=rotations, n=st.integers(1, 40))
def test_a_rotation_is_its_block_diagonal_matrix(rotation: Rotation, n: int) -> None:
    matrix = block_diagonal(rotation, n)
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    torch.testing.assert_close(rotation.forward(x), x @ matrix.T)
    torch.testing.assert_close(rotation.inverse(x), x @ matrix)
    torch.testing.assert_close(rotation.inverse(rotation.forward(x)), x)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))


def test_the_blocks_of_real_widths() -> None:
    """576 = 512 + 64 and 1536 = 1024 + 512 for hadamard: unit vectors spread over their own block alone."""
    for cols, blocks in [(576, [512, 64]), (1536, [1024, 512]), (192, [128, 64]), (7, [4, 2, 1])]:
        spread = Rotation("hadamard", 1024).forward(torch.eye(cols)).abs().gt(0).sum(1)
        assert spread.tolist() == [size for size in blocks for _ in range(size)]


def test_hadamard_of_two_and_dct_of_two_are_the_same_turn() -> None:
    x = torch.tensor([[3.0, 1.0]])
    for kind in ("hadamard", "dct"):
        turned = Rotation(kind, 2).forward(x)  # type: ignore[arg-type]
        torch.testing.assert_close(turned, torch.tensor([[4.0, 2.0]]) / math.sqrt(2))


def coded(rows: int, cols: int) -> Coded:
    codes = torch.randint(0, 16, (rows, cols), generator=torch.Generator().manual_seed(1))
    return Coded(rows, cols, 4, "int", layout.pack(codes, 4), row=torch.linspace(0.5, 1.5, rows)[:, None])


def codebook(rows: int, cols: int) -> Codebook:
    count = rows * -(-cols // 4)
    codes = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1))
    return Codebook(rows, cols, 8, 4, Book(), layout.pack(codes, 8), torch.tensor(0.5))


def patches(rows: int, cols: int) -> Patches:
    count = -(-rows // 4) * -(-cols // 4)
    present = layout.pack(torch.arange(count) % 3 > 0, 1)
    kept = int((torch.arange(count) % 3 > 0).sum())
    codes = torch.randint(0, 4, (kept, 16), generator=torch.Generator().manual_seed(1))
    return Patches(rows, cols, 4, 2, layout.pack(codes, 2), torch.linspace(0.5, 1.5, kept), present)


SIDES: list[tuple[Rotation | None, Rotation | None]] = [
    (Rotation("hadamard", 16), None),
    (None, Rotation("dct", 8)),
    (Rotation("dct", 4), Rotation("dct", 4)),
    (None, None),
]


@pytest.mark.parametrize("inner", [coded, codebook, patches], ids=lambda inner: inner.__name__)
@pytest.mark.parametrize("sides", SIDES, ids=["in", "out", "both", "none"])
def test_a_rotated_term_is_the_product_of_its_matrices(
    inner: Callable[[int, int], Term], sides: tuple[Rotation | None, Rotation | None]
) -> None:
    for rows, cols in [(5, 7), (33, 65)]:
        term = Rotated(inner(rows, cols), *sides)  # type: ignore[arg-type]
        expected = term.term.decode().double()
        if term.t_in:
            expected = expected @ block_diagonal(term.t_in, cols)
        if term.t_out:
            expected = block_diagonal(term.t_out, rows).T @ expected
        torch.testing.assert_close(term.decode().double(), expected, rtol=1e-5, atol=1e-5)
        assert (term.rows, term.cols) == (rows, cols)
        for dtype in RELATIVE_RMS:
            check(term.serving(), dtype)


def test_a_rotated_term_that_fits_on_paper() -> None:
    """Ones in the first row, turned: √2 in the first column of each block."""
    ones = Coded(2, 4, 16, "float", torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]).bfloat16())
    term = Rotated(ones, Rotation("hadamard", 2), None)
    torch.testing.assert_close(term.decode(), torch.tensor([[2.0, 0, 2, 0], [0, 0, 0, 0]]) / math.sqrt(2))
    y = apply_term(torch.tensor([[1.0, 5.0, 10.0, 50.0]]), term)
    torch.testing.assert_close(y, torch.tensor([[22 / math.sqrt(2), 0]]))


def test_what_holds_for_the_term_holds_between_rotations() -> None:
    term = Rotated(patches(9, 9), Rotation("dct", 4), Rotation("dct", 4))
    assert term.nbytes == term.term.nbytes
    assert term.serving().nbytes == term.nbytes + 8 * len(term.term.scale)  # type: ignore[union-attr]
    assert sorted(term.tensors()) == ["term.codes", "term.present", "term.scale"]
    broken = Rotated(Placed(coded(4, 4), 9, 4, torch.tensor([0b11], dtype=torch.uint8)))
    assert broken.problems() == ["term: a term of 4 columns in blocks of 8"]


@pytest.mark.parametrize("kind", ["hadamard", "dct"])
def test_inputs_are_not_modified(kind: Literal["hadamard", "dct"]) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    Rotation(kind, 4).forward(x)
    apply_term(x, Rotated(coded(5, 8), Rotation(kind, 4), Rotation(kind, 4)))
    assert torch.equal(x, before)
