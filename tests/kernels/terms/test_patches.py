"""Patches: where each is, what its codes say, what an edge cuts off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels import layout
from deltaserve_kernels.apply import apply_term
from deltaserve_kernels.terms import Patches

from ..test_apply import check
from ..tolerances import RELATIVE_RMS


def make(rows: int, cols: int, size: int, bits: int, share: float = 0.6) -> Patches:
    """At least one patch is present."""
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    present = torch.rand(-(-rows // size) * -(-cols // size), generator=generator) < share
    present[0] = True
    count = int(present.sum())
    codes = torch.randint(0, 2**bits, (count, size**2), generator=generator)
    scale = (torch.rand(count, generator=generator) + 0.5).bfloat16()
    return Patches(rows, cols, size, bits, layout.pack(codes, bits), scale, layout.pack(present.to(torch.uint8), 1))


def entries(term: Patches) -> list[list[float]]:
    """The definition, entry by entry."""
    across = -(-term.cols // term.size)
    numbers = [n for n in range(8 * len(term.present)) if int(term.present[n // 8]) >> n % 8 & 1]
    codes = layout.unpack(term.codes, term.bits, term.size**2).tolist()

    def entry(i: int, j: int) -> float:
        number = i // term.size * across + j // term.size
        if number not in numbers:
            return 0.0
        k = numbers.index(number)
        code = codes[k][i % term.size * term.size + j % term.size]
        return float(term.scale[k]) * (2 * code - 2**term.bits + 1)

    return [[entry(i, j) for j in range(term.cols)] for i in range(term.rows)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    size=st.integers(1, 6),
    bits=st.integers(1, 8),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_entry_is_its_patchs(rows: int, cols: int, size: int, bits: int, share: float) -> None:
    term = make(rows, cols, size, bits, share)
    assert term.decode().tolist() == entries(term)


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize(("rows", "cols", "size"), [(5, 7, 4), (33, 65, 16), (48, 576, 32), (4, 4, 8)], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_products_of_patches_are_the_decoded_matrix(
    rows: int, cols: int, size: int, bits: int, dtype: torch.dtype
) -> None:
    check(make(rows, cols, size, bits).serving(), dtype)


def test_patches_that_fit_on_paper() -> None:
    """2 × 2 patches of a 3 × 3 matrix; the first and the last one are present, the last one hangs over."""
    codes = layout.pack(torch.tensor([[0, 1, 2, 3], [3, 0, 0, 0]]), 2)
    term = Patches(3, 3, 2, 2, codes, torch.tensor([1.0, 10.0]), torch.tensor([0b1001], dtype=torch.uint8))
    assert term.decode().tolist() == [[-3, -1, 0], [1, 3, 0], [0, 0, 30]]
    assert apply_term(torch.tensor([[1.0, 2.0, 3.0]]), term.serving()).tolist() == [[-5, 7, 90]]


def test_no_patch_is_zero() -> None:
    term = make(9, 9, 4, 2, 0.0)
    none = replace(term, codes=term.codes[:0], scale=term.scale[:0], present=torch.zeros_like(term.present))
    assert not none.decode().any()
    assert apply_term(torch.ones(2, 9), none.serving()).tolist() == [[0.0] * 9] * 2


@pytest.mark.parametrize("missing", ["scale", "present"])
def test_a_count_that_does_not_add_up_is_named(missing: str) -> None:
    term = make(9, 9, 4, 2)
    assert term.problems() == []
    count = len(term.scale)
    if missing == "scale":
        assert replace(term, scale=term.scale[1:]).problems() == [
            f"{count - 1} patches, but {count} are said to be present"
        ]
    else:
        bare = replace(term, present=torch.zeros_like(term.present))
        assert bare.problems() == [f"{count} patches, but 0 are said to be present"]


def test_bytes_are_codes_scales_and_one_bit_a_patch() -> None:
    term = make(33, 65, 16, 3)
    count = len(term.scale)
    assert term.nbytes == count * (64 + 32) + count * 2 + 2  # planes of 2 and 1 bits; 15 patches
    assert term.serving().nbytes == term.nbytes + 8 * count
    assert term.serving().serving().index is not None
    copy = term.serving().to("cpu", copy=True)
    assert copy.index is not None and torch.equal(copy.decode(), term.decode())
    assert copy.codes.data_ptr() != term.codes.data_ptr()
