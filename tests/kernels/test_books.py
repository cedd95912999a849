"""The tables of vectors: numbers of the format, frozen, and as good as their source says."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels.books.make import BOOKS, distortion, find, normals
from deltaserve_kernels.philox import random_words
from deltaserve_kernels.terms import Book
from deltaserve_kernels.terms.books import GRIDS, SEED, SITE

BEST = {(1, 1): 0.3634, (1, 2): 0.1175, (1, 3): 0.03454, (1, 4): 0.009497}  # Max 1960, table I


def test_the_shipped_file_is_frozen() -> None:
    """Part of format version 1: another file makes artifacts on disk mean other weights."""
    digest = hashlib.sha256(GRIDS.read_bytes()).hexdigest()
    assert digest == "fc1b278f098ed509c38e205020f9aeb520ee1f9663f6dfab7e0d1444bca204e3"


def test_the_shipped_file_holds_the_books_that_the_maker_lists() -> None:
    book = Book("gaussian")
    assert all(book.exists(bits, length) for length, bits in BOOKS)
    assert not book.exists(8, 11) and not book.exists(9, 2)
    for length, bits in BOOKS:
        table = book.table(bits, length)
        assert table.shape == (2**bits, length) and table.dtype == torch.float32
        assert torch.equal(table.bfloat16().float(), table)


def test_the_maker_finds_the_shipped_book() -> None:
    """From fewer samples."""
    torch.testing.assert_close(find(1, 2, 2**15), Book("gaussian").table(2, 1), rtol=0.05, atol=0)


@pytest.mark.parametrize("length, bits", BEST)
def test_the_grids_of_numbers_are_close_to_the_best(length: int, bits: int) -> None:
    measured = distortion(Book("gaussian").table(bits, length), normals(2**16, length, 7))
    assert measured == pytest.approx(BEST[length, bits], rel=0.05)


@pytest.mark.parametrize("length, bits", [(2, 4), (2, 6), (4, 8), (8, 8), (16, 8), (32, 8)])
def test_longer_vectors_of_a_rate_are_better_and_none_beats_the_bound(length: int, bits: int) -> None:
    measured = distortion(Book("gaussian").table(bits, length), normals(2**12, length, 7))
    assert 2 ** (-2 * bits / length) < measured
    if (same_rate := (1, bits // length)) in BEST:
        assert measured < BEST[same_rate]


def test_the_seeded_table_is_frozen() -> None:
    """As above: the integers before the division by √8."""
    rows = {0: [[0, 4, 4, 0, -4], [4, 0, 0, -4, 0]], 1: [[-6, 2, 2, 2, 2], [2, 2, 2, 2, 2]]}
    for stream, first in rows.items():
        table = Book(stream=stream).table(4, 5).double()
        assert torch.equal(table[3 : 3 + len(first)], (torch.tensor(first).double() / 8**0.5).float().double())


@pytest.mark.parametrize("bits, length, stream", [(1, 1, 0), (3, 6, 3), (5, 9, 1), (2, 40, 0), (6, 64, 2)])
def test_the_seeded_table_is_its_formula(bits: int, length: int, stream: int) -> None:
    n = max(2, 2 ** math.ceil(math.log2(length)))
    for c in range(2**bits):
        k, a = divmod(c, n)
        words = random_words(SEED, SITE, k + 1, n, stream=stream)[k].tolist()
        for j in range(length):
            flips = ((a & m).bit_count() + words[m] + (m & j).bit_count() for m in range(n))
            expected = sum((-1) ** flip for flip in flips) / math.sqrt(n)
            assert float(Book(stream=stream).table(bits, length)[c, j]) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(bits=st.integers(1, 6), length=st.integers(33, 64), stream=st.integers(0, 2))
def test_a_shorter_table_is_the_beginning_of_a_longer_one(bits: int, length: int, stream: int) -> None:
    whole = Book(stream=stream).table(7, 64)
    assert torch.equal(Book(stream=stream).table(bits, length), whole[: 2**bits, :length])


def test_seeded_entries_are_normal_enough_and_vectors_far_apart() -> None:
    table = Book().table(11, 64)
    assert float(table.mean()) == pytest.approx(0, abs=0.01)
    assert float(table.pow(2).mean()) == pytest.approx(1, abs=1e-6)
    assert float(table.pow(4).mean()) == pytest.approx(3, abs=0.2)
    assert float((table @ table.T / 64).fill_diagonal_(0).abs().max()) < 6 / 8
