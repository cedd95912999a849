"""bfloat16(x) · decode(term)ᵀ in float64 against the native kernels, over every form that they read."""

from __future__ import annotations

import itertools

import pytest
import torch

from deltaserve_kernels.native.library import Library
from deltaserve_kernels.native.parts import Part, part_of
from deltaserve_kernels.native.site import apply_part
from deltaserve_kernels.terms import Book, Coded, Rotated, Rotation, SeededMask, Term

from ..forms import PRECISION, Maker, activations, forms, integers, whole_forms
from ..tolerances import NATIVE_RELATIVE_RMS, relative_rms

SHAPES = [(1, 1), (1, 37), (37, 1), (16, 32), (33, 65), (97, 131), (200, 70)]  # rows, cols
WHOLE_SHAPES = [(1, 16), (36, 64), (132, 128)]
TOKENS = [1, 3, 8, 17, 40]


def part(term: Term) -> Part:
    made = part_of(term)
    assert made is not None
    return made


@pytest.mark.parametrize("name", forms(1, 1))
def test_a_part_is_its_terms_matrix(library: Library, name: str) -> None:
    for shape in SHAPES:
        term = forms(*shape)[name]
        x = activations(TOKENS[-1], term.cols)
        expected = 1.5 * x.double() @ term.decode().double().T
        y = apply_part(library, x, part(term), 1.5)
        assert y.dtype == torch.float32
        assert y.shape == (len(x), term.rows)
        assert relative_rms(y, expected) < NATIVE_RELATIVE_RMS[PRECISION.get(name, "exact")], shape


@pytest.mark.parametrize("name", forms(1, 1))
def test_a_row_depends_on_neither_its_batch_nor_the_threads(library: Library, name: str) -> None:
    for shape in SHAPES:
        term = forms(*shape)[name]
        made = part(term)
        library.set_threads(1)
        x = activations(TOKENS[-1], term.cols)
        expected = apply_part(library, x, made)
        for threads, tokens in itertools.product((1, 2), TOKENS):
            library.set_threads(threads)
            assert torch.equal(apply_part(library, x[:tokens], made), expected[:tokens]), (shape, threads, tokens)


@pytest.mark.parametrize("name", whole_forms(1, 16))
def test_small_integers_and_powers_of_two_are_exact(library: Library, name: str) -> None:
    for shape in WHOLE_SHAPES:
        term = whole_forms(*shape)[name]
        x = integers(17, term.cols)
        y = apply_part(library, x, part(term), 0.5)
        assert torch.equal(y.double(), 0.5 * x.double() @ term.decode().double().T), shape


@pytest.mark.parametrize("cols", [1500, 5000])
def test_wide_factors_under_masks(library: Library, cols: int) -> None:
    """The layer's input is wider than the rank by far, and either is made into an input of its own."""
    mask = SeededMask(4, 5, 9, keep=2)
    term = Maker(40, cols).factors(24, {"mask": mask}, {"mask": mask})
    x = activations(3, cols)
    y = apply_part(library, x, part(term))
    assert relative_rms(y, x.double() @ term.decode().double().T) < NATIVE_RELATIVE_RMS["rounded"]


def test_no_rows_give_no_rows(library: Library) -> None:
    assert apply_part(library, torch.zeros(0, 7), part(Maker(5, 7).coded(5, 7))).shape == (0, 5)


def test_a_part_keeps_nothing_of_its_term() -> None:
    """A server drops the term: the file it was mapped from may go."""
    coded = Maker(40, 70).coded(40, 70, 4, col=torch.rand(70))
    terms: list[Term] = [coded, Coded(40, 70, 32, "float", torch.rand(40, 70), row=torch.rand(40, 1))]
    for term in terms:
        theirs = {tensor.untyped_storage().data_ptr() for tensor in term.tensors().values()}
        assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in part(term).tensors.values()}


def test_resident_bytes_are_those_of_whole_tiles() -> None:
    """A one-bit matrix of 64 × 96 takes 64 · 96 / 8 bytes, its table 64 and its row scales 256."""
    assert part(Maker(64, 96).coded(64, 96, 1, "sign")).nbytes == 64 * 96 // 8 + 64 + 4 * 64
    assert part(Maker(1, 1).coded(1, 1, 1, "sign", row=None)).nbytes == 32 * 32 // 8 + 64


@pytest.mark.parametrize(
    "term",
    [
        Coded(8, 8, 16, "float", torch.zeros(8, 4).bfloat16(), mask=SeededMask(2, 5, 9)),
        Maker(8, 9).coded(8, 9, row=torch.ones(8, 3), group=3),
        Maker(8, 8).patches(4, 2),
        Maker(8, 8).book(6, 4, tile=2, signed=False, book=Book("gaussian")),
        Rotated(Maker(8, 8).coded(8, 8), t_out=Rotation("hadamard", 4)),
        Rotated(Maker(8, 8).coded(8, 8, row=None), t_out=Rotation("hadamard", 128)),
        Rotated(Maker(8, 8).coded(8, 8, row=None, col=torch.ones(8)), t_in=Rotation("hadamard", 4)),
        Rotated(Maker(8, 8).factors(2, {}, {}), t_in=Rotation("hadamard", 4)),
    ],
    ids=[
        "float-values-under-a-mask", "groups-of-odd-length", "patches-of-4", "gaussian-blocks-of-several-rows",
        "rows-scaled-before-they-are-turned-back", "a-block-larger-than-a-chunk", "columns-scaled-after-a-transform",
        "transformed-factors",
    ],
)  # fmt: skip
def test_forms_that_are_left_to_torch(term: Term) -> None:
    assert part_of(term) is None
